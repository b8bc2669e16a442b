"""One flash call for a packed row: borders, gathered keys and window, and (cuda) the real kernel.

On a CPU the kernel is stood in for by its definition in plain PyTorch, so that what is tested is
all that is ours: which query is told which keys.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen

from rmipo_lite.model import attention, varlen_attention
from rmipo_lite.model.attention import segment_attention
from rmipo_lite.model.batch import Segment, SegmentPlan
from tests.kit import ARCHITECTURES, tiny_model
from tests.model.test_attention import _assert_same

# [P1 C1 R1 P2 C2 R2]: two prompts of 5 and 1 tokens; a chosen side is one segment with its prompt.
SEGMENTS = (
    Segment(0, 9, 0, 0), Segment(9, 15, 0, 5), Segment(15, 19, 15, 15), Segment(19, 26, 15, 16),
)  # fmt: skip


def plain_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """What torch documents of `varlen_attn`, with a bottom-right causal mask."""
    assert window_size[1] == 0
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert enable_gqa == (query.shape[1] != key.shape[1])
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    pieces = []
    q_borders, k_borders = cu_seq_q.tolist(), cu_seq_k.tolist()
    assert max_q == max(b - a for a, b in itertools.pairwise(q_borders))
    assert max_k == max(b - a for a, b in itertools.pairwise(k_borders))
    for i in range(len(q_borders) - 1):
        q = query[q_borders[i] : q_borders[i + 1]].transpose(0, 1)
        k, v = (x[k_borders[i] : k_borders[i + 1]].transpose(0, 1) for x in (key, value))
        ahead = k.shape[1] - q.shape[1]
        distance = (
            torch.arange(q.shape[1])[:, None] + ahead - torch.arange(k.shape[1])[None]
        )  # of a key before its query
        seen = distance >= 0
        if window_size[0] >= 0:
            seen &= distance <= window_size[0]
        scores = (q @ k.transpose(1, 2) * scale).masked_fill(~seen, -torch.inf)
        pieces.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(pieces)


def varlen_of_2_11(*args: Any, scale: float | None, window_size: tuple[int, int]) -> Tensor:
    """Has no word for fewer heads of keys, and takes them."""
    gqa = args[0].shape[1] != args[1].shape[1]
    return plain_varlen(*args, scale=scale, window_size=window_size, enable_gqa=gqa)


@pytest.fixture(params=[plain_varlen, varlen_of_2_11])
def kernel(request: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(attention, "fits", lambda *args, softcap, **_: softcap is None)
    monkeypatch.setattr(varlen, "varlen_attn", request.param)
    varlen_attention._asks_about_heads.cache_clear()
    yield
    varlen_attention._asks_about_heads.cache_clear()


def draw(heads: int, kv_heads: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, count, 26, 32, generator=generator).to(device, dtype).requires_grad_()
        for count in (heads, kv_heads, kv_heads)
    ]


def both(
    tensors: list[Tensor], flash: bool, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> list[Tensor]:
    """Output and gradients."""
    with monkeypatch.context() as patch:
        if not flash:
            patch.setattr(attention, "fits", lambda *args, **_: False)
        out, _ = segment_attention(
            torch.nn.Identity(), *tensors, None, scaling=0.2, sliding_window=window,
            segment_plan=SegmentPlan(SEGMENTS),
        )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(out.shape, generator=generator).to(out)
    return [out, *torch.autograd.grad((out * weights).sum(), tensors)]


@pytest.mark.parametrize("window", [None, 1, 3, 8, 100])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)])
def test_one_call_is_attention_by_segments(
    kernel: None, heads: tuple[int, int], window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = draw(*heads, torch.float64, "cpu")
    one, many = (both(tensors, flash, window, monkeypatch) for flash in (True, False))
    for a, b in zip(one, many, strict=True):
        torch.testing.assert_close(a, b)


def test_borders_are_built_once_and_a_row_without_prefixes_is_not_copied() -> None:
    plan = SegmentPlan(SEGMENTS)
    borders = varlen_attention.borders_of(plan, torch.device("cpu"))
    assert borders.cu_seq_q.tolist() == [0, 9, 15, 19, 26]
    assert borders.cu_seq_k.tolist() == [0, 9, 20, 24, 32]
    assert (borders.max_q, borders.max_k) == (9, 11)
    assert borders.key_index is not None
    assert borders.key_index[9:20].tolist() == [0, 1, 2, 3, 4, 9, 10, 11, 12, 13, 14]
    assert varlen_attention.borders_of(plan, torch.device("cpu")) is borders
    alone = SegmentPlan((Segment(0, 4, 0, 0), Segment(4, 6, 4, 4)))
    assert varlen_attention.borders_of(alone, torch.device("cpu")).key_index is None


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_equals_padded_through_it(kernel: None, name: str, tmp_path: Path) -> None:
    _assert_same(tiny_model(name), tmp_path)


def test_a_cpu_or_another_kind_of_attention_goes_by_segments() -> None:
    tensors = draw(4, 4, torch.bfloat16, "cpu")
    assert not varlen_attention.fits(*tensors, dropout=0.0, softcap=None)


@pytest.mark.cuda
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_flash_kernel_is_attention_by_segments(
    dtype: torch.dtype, heads: tuple[int, int], window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.get_device_capability()[0] < 8:
        pytest.skip("the flash kernel wants Ampere or newer")
    tensors = draw(*heads, dtype, "cuda")
    assert varlen_attention.fits(*tensors, dropout=0.0, softcap=None)
    one = both(tensors, True, window, monkeypatch)
    exact = [t.detach().double().cpu().requires_grad_() for t in tensors]
    want = both(exact, False, window, monkeypatch)
    for a, b in zip(one, want, strict=True):
        assert (a.detach().cpu().double() - b).norm() <= 2e-2 * b.norm()
