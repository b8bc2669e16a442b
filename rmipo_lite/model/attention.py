"""Attention for packed rows with shared prompts, registered with transformers.

On Ampere and newer a row is one call of the flash kernel (varlen_attention.py). Elsewhere each
segment of a row is one `scaled_dot_product_attention` call whose keys are [prefix; segment] under a
bottom-right causal mask. That runs on every device and dtype, and was measured at less than half
the time of one dense 4D mask.

The function is registered in transformers' `AttentionInterface` only, not in its mask interface:
the model then builds no mask, and the plan reaches this function as a keyword. Stock attention
would be silently wrong on a packed row (a restart of the positions reads as a new document), so
`packed_attention` puts the function in place for a forward and backward pass and takes it out
again.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import repeat_kv

from rmipo_lite.model.batch import SegmentPlan
from rmipo_lite.model.varlen_attention import fits, varlen_attention
from rmipo_lite.ops.devices import is_trusted

ATTENTION_NAME = "rmipo_packed"

# Keywords by which models ask for attention that this function does not do. Ignoring one of them
# would be a wrong result; raising sends the run to the padded path.
_UNSUPPORTED = ("s_aux", "position_bias", "head_mask")


def segment_attention(
    module: nn.Module,
    query: Tensor,  # (1, heads, T, D)
    key: Tensor,  # (1, kv_heads, T, D)
    value: Tensor,  # (1, kv_heads, T, D)
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    segment_plan: SegmentPlan | None = None,
    attend: Callable[..., Tensor] = scaled_dot_product_attention,
    **kwargs: Any,
) -> tuple[Tensor, None]:  # (1, T, heads, D)
    """Attend within each segment of the plan and to the segment's prefix.

    `attend` is what each segment's attention is computed with.

    Raises:
        ValueError: no plan came (the row is not packed), or the model wants a kind of attention
            that this function doesn't do.
    """
    if segment_plan is None or attention_mask is not None:
        raise ValueError(
            f"attention {ATTENTION_NAME!r} reads packed rows only: it wants a segment plan and no "
            "mask. Outside `packed_attention(model)` the model keeps its own attention."
        )
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(f"attention {ATTENTION_NAME!r} does not support {name!r}")
    if fits(query, key, value, dropout=dropout, softcap=softcap):
        flash = varlen_attention(
            query, key, value, segment_plan, scaling=scaling, sliding_window=sliding_window
        )
        return flash, None
    groups = query.shape[1] // key.shape[1]
    # Split, not slices: the gradient of a split is one concatenation, that of a slice a row of
    # zeros as long as the whole batch.
    lengths = [segment.end - segment.start for segment in segment_plan.segments]
    queries = query.split(lengths, dim=2)
    keys = repeat_kv(key, groups).split(lengths, dim=2)
    values = repeat_kv(value, groups).split(lengths, dim=2)
    at = {segment.start: index for index, segment in enumerate(segment_plan.segments)}
    pieces = []
    for index, segment in enumerate(segment_plan.segments):
        mask = _mask(segment_plan, index, sliding_window, query.device)
        q, k, v = queries[index], keys[index], values[index]
        if segment.prefix_len:
            # A prefix is the beginning of the segment that starts where it does.
            first = at[segment.prefix_start]
            k = torch.cat([keys[first][:, :, : segment.prefix_len], k], dim=2)
            v = torch.cat([values[first][:, :, : segment.prefix_len], v], dim=2)
        if softcap is not None or not is_trusted(query.device.type):
            pieces.append(_eager(q, k, v, mask, scaling, softcap, dropout))
        else:
            # No mask means plain causal, which the fast kernels know by themselves.
            pieces.append(
                attend(q, k, v, mask, dropout_p=dropout, is_causal=mask is None, scale=scaling)
            )
    return torch.cat(pieces, dim=2).transpose(1, 2).contiguous(), None


def _mask(
    plan: SegmentPlan, index: int, window: int | None, device: torch.device
) -> Tensor | None:  # (q, k) bool, True = attends; None = plain causal
    segment = plan.segments[index]
    q_len = segment.end - segment.start
    k_len = segment.prefix_len + q_len
    if window is not None and window >= k_len:
        window = None
    if window is None and not segment.prefix_len:
        return None
    cached = plan.built.get((index, window, device))
    if cached is None:
        # Bottom-right: query i of the segment is token prefix_len + i of its text.
        q_position = torch.arange(segment.prefix_len, k_len, device=device)[:, None]
        k_position = torch.arange(k_len, device=device)[None, :]
        cached = k_position <= q_position
        if window is not None:
            cached &= k_position > q_position - window
        plan.built[index, window, device] = cached
    return cached


def _eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    """Attention step by step.

    For softcap * tanh(scores / softcap), which the fused kernels don't have, and where these aren't
    trusted.
    """
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.matmul(q, k.transpose(2, 3)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is None:
        length = q.shape[2]
        mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    # fp32 as the models' own eager attention does it.
    probabilities = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    if dropout:
        probabilities = nn.functional.dropout(probabilities, p=dropout)
    return torch.matmul(probabilities, v)


AttentionInterface.register(ATTENTION_NAME, segment_attention)


def _configs(model: nn.Module) -> list[PretrainedConfig]:
    """Every distinct config that a module of the model reads its attention from."""
    found: dict[int, PretrainedConfig] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PretrainedConfig):
            found[id(config)] = config
    return list(found.values())


@contextmanager
def packed_attention(model: nn.Module, name: str = ATTENTION_NAME) -> Iterator[None]:
    """Let the model attend by segments inside the block, and as before after it.

    `name` is under which transformers' interface knows the function.

    The backward pass belongs inside: gradient checkpointing runs the forward pass again in it.
    """
    configs = _configs(model)
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = name
        yield
    finally:
        # Parents first: setting a parent's value writes its sub-configs' too.
        for config, own in zip(configs, before, strict=True):
            config._attn_implementation = own
