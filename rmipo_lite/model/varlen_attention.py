"""Attention for packed rows in one call of the flash kernel, on Ampere and newer.

The kernel takes borders of its own for queries and for keys. A segment's queries stand in the row
as they are; its keys are [prefix; segment], gathered once per layer, so that a prompt is attended
to by both responses though it was computed once. Its causal mask is bottom-right: the last query
sees every key, as a text's last token does. One call a layer, where attention by segments
(attention.py) makes several for each segment.
"""

import inspect
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.attention import varlen

from rmipo_lite.model.batch import SegmentPlan
from rmipo_lite.ops.devices import is_nvidia

_DTYPES = (torch.bfloat16, torch.float16)
# Trained too on every card: heads of 193 to 224 go through the backward kernel for 256, which has a
# form for cards with little shared memory. That scaled_dot_product_attention won't choose flash for
# them on some is a rule of its own choice alone.
_LARGEST_HEAD = 256
_OLDEST = 8  # compute capability of Ampere


class Borders(NamedTuple):
    """What the kernel is told of a row: built by the first layer, read by those after it."""

    cu_seq_q: Tensor  # (S + 1,) int32
    cu_seq_k: Tensor  # (S + 1,) int32
    max_q: int
    max_k: int
    key_index: Tensor | None  # (K,) int64, the row's place of every key; None: the row itself


def fits(
    query: Tensor,  # (1, heads, T, D)
    key: Tensor,  # (1, kv_heads, T, D)
    value: Tensor,  # (1, kv_heads, T, D)
    *,
    dropout: float,
    softcap: float | None,
) -> bool:
    """Whether the flash kernel does this: its device, dtype and head, no dropout and no softcap."""
    head = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in _DTYPES
        and query.dtype == key.dtype == value.dtype
        and value.shape[-1] == head
        and head % 8 == 0
        and head <= _LARGEST_HEAD
        and not dropout
        and softcap is None
        and _has_flash(query.device)
    )


@cache
def _has_flash(device: torch.device) -> bool:
    return (
        torch.backends.cuda.is_flash_attention_available()
        and is_nvidia(device.type)  # AMD's capability counts otherwise
        and torch.cuda.get_device_capability(device)[0] >= _OLDEST
    )


@cache
def _asks_about_heads() -> bool:
    """Whether this torch wants to be told of fewer heads of keys; 2.11 hands them to the kernel."""
    return "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters


def borders_of(plan: SegmentPlan, device: torch.device) -> Borders:
    """The borders of a plan on a device."""
    known = plan.built.get(device)
    if known is not None:
        return known
    q_lengths = [segment.end - segment.start for segment in plan.segments]
    k_lengths = [
        segment.prefix_len + q for segment, q in zip(plan.segments, q_lengths, strict=True)
    ]

    def cumulated(lengths: list[int]) -> Tensor:
        return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(
            device, non_blocking=True
        )

    key_index = None
    if q_lengths != k_lengths:
        places = [
            torch.arange(start, end)
            for segment in plan.segments
            for start, end in (
                (segment.prefix_start, segment.prefix_end),
                (segment.start, segment.end),
            )
        ]
        key_index = torch.cat(places).to(device, non_blocking=True)
    borders = Borders(
        cumulated(q_lengths), cumulated(k_lengths), max(q_lengths), max(k_lengths), key_index
    )
    plan.built[device] = borders
    return borders


def varlen_attention(
    query: Tensor,  # (1, heads, T, D)
    key: Tensor,  # (1, kv_heads, T, D)
    value: Tensor,  # (1, kv_heads, T, D)
    plan: SegmentPlan,
    *,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:  # (1, T, heads, D)
    """Attend within each segment of the plan and to the segment's prefix; see `fits`."""
    borders = borders_of(plan, query.device)
    groups = query.shape[1] // key.shape[1]
    keys, values = (_gathered(x, borders.key_index) for x in (key, value))
    options: dict[str, Any] = {}
    if groups > 1 and _asks_about_heads():
        options["enable_gqa"] = True
    # The kernel counts the tokens before a query, transformers the query too.
    narrow = sliding_window is not None and sliding_window < borders.max_k
    left = sliding_window - 1 if narrow and sliding_window is not None else -1
    out = varlen.varlen_attn(
        query[0].transpose(0, 1),
        keys,
        values,
        borders.cu_seq_q,
        borders.cu_seq_k,
        borders.max_q,
        borders.max_k,
        scale=scaling,
        window_size=(left, 0),
        **options,
    )
    return cast(Tensor, out)[None]  # a tuple only where more than the output is asked for


def _gathered(x: Tensor, index: Tensor | None) -> Tensor:  # (1, heads, T, D) -> (K, heads, D)
    rows = x[0].transpose(0, 1)
    return rows if index is None else rows.index_select(0, index)
