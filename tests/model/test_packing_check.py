"""Packed against padded before a run: rounding passes, a fault doesn't."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from rmipo_lite.model import batch, packing_check
from rmipo_lite.model.attention import packed_attention, segment_attention
from rmipo_lite.model.backbone import scored_hidden
from rmipo_lite.model.batch import ModelInput, SegmentPlan
from rmipo_lite.model.packing_check import packing_problem
from rmipo_lite.ops import native
from rmipo_lite.tokens.pair import TokenizedPair
from tests.kit import random_pairs, tiny_model

HALF = (torch.bfloat16, torch.float16)
PAIRS = random_pairs(8, longest=40)


def _problem(model: nn.Module, impl: native.Impl = "torch") -> str | None:
    return packing_problem(model, PAIRS, impl, 0)


def _deep_model(layers: int, dtype: torch.dtype, share: float = 0.0) -> nn.Module:
    """Activations of a large model's size, and attention outputs that round at random.

    Each pass moves another `share` of them by one rounding step, as another kernel would.
    """
    model = tiny_model(
        "mistral", num_hidden_layers=layers, hidden_size=64, intermediate_size=96, sliding_window=9
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.02 if "embed" in name else 0.16)
    step = torch.finfo(dtype).eps
    generator = torch.Generator().manual_seed(1)

    def rounds(_module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        moved = torch.rand(args[0].shape, generator=generator) < share
        return (torch.where(moved, args[0] * (1 + step), args[0]),)

    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(rounds)
    return model.to(dtype)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("layers", [2, 32])
@pytest.mark.parametrize("share", [1e-4, 1e-2])
def test_a_models_own_rounding_leaves_packing_on(
    share: float, layers: int, dtype: torch.dtype
) -> None:
    assert _problem(_deep_model(layers, dtype, share)) is None


class _RoundsInside(nn.Linear):
    """As bitsandbytes' layers under weights that peft has prepared: float32 outside alone."""

    compute_dtype = torch.bfloat16

    def forward(self, x: Tensor) -> Tensor:
        low = [part.to(self.compute_dtype) for part in (x, self.weight)]
        return nn.functional.linear(*low).to(x.dtype)


def _rounding_inside(layers: int) -> nn.Module:
    model = _deep_model(layers, torch.float32)
    step, generator = torch.finfo(torch.bfloat16).eps, torch.Generator().manual_seed(1)

    def rounds(_module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        moved = torch.rand(args[0].shape, generator=generator) < 0.01
        return (torch.where(moved, args[0] * (1 + step), args[0]),)

    for layer in model.model.layers:
        for linear in (m for m in layer.modules() if type(m) is nn.Linear):
            linear.__class__ = _RoundsInside
        layer.self_attn.o_proj.register_forward_pre_hook(rounds)
    return model


def test_a_head_in_float32_over_16_bits_leaves_packing_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _problem(_rounding_inside(8)) is None
    _edited(_one_further, monkeypatch)
    assert "differ from the padded ones" in str(_problem(_rounding_inside(8)))


def test_the_rounding_is_measured_only_where_the_forms_differ() -> None:
    """Or every run would pay for one more pass."""
    for model, passes in ((_deep_model(2, torch.bfloat16), 3), (_deep_model(32, HALF[0], 0.01), 5)):
        count = []
        model.model.register_forward_pre_hook(lambda _module, _args, count=count: count.append(1))
        assert _problem(model) is None
        assert len(count) == passes
        assert not model.get_input_embeddings()._forward_hooks


def _edited(edit: Callable[[ModelInput], ModelInput], monkeypatch: pytest.MonkeyPatch) -> None:
    right = batch.policy_input

    def wrong(pairs: list[TokenizedPair], packing: bool, pad_id: int = 0) -> ModelInput:
        inputs = right(pairs, packing, pad_id)
        return edit(inputs) if packing else inputs

    monkeypatch.setattr(batch, "policy_input", wrong)


def _one_further(inputs: ModelInput) -> ModelInput:
    """Every rejected response reads its positions one too high."""
    positions = inputs.position_ids.clone()
    for segment in inputs.plan.segments:
        if segment.prefix_len:
            positions[0, segment.start : segment.end] += 1
    return replace(inputs, position_ids=positions)


def _leaking(inputs: ModelInput) -> ModelInput:
    """Every rejected response reads the chosen one, too."""
    segments = [
        replace(segment, prefix_end=segment.start) if segment.prefix_len else segment
        for segment in inputs.plan.segments
    ]
    return replace(inputs, plan=SegmentPlan(tuple(segments)))


def _without_window(monkeypatch: pytest.MonkeyPatch) -> None:
    def everywhere(*args: Any, sliding_window: int | None = None, **kwargs: Any) -> Any:
        return segment_attention(*args, **kwargs)

    AttentionInterface.register("no_window", everywhere)
    monkeypatch.setattr(
        packing_check, "packed_attention", functools.partial(packed_attention, name="no_window")
    )


PACKED_FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "position": functools.partial(_edited, _one_further),
    "leak": functools.partial(_edited, _leaking),
    "window": _without_window,
}


@pytest.mark.parametrize(
    ("layers", "dtype"), [(2, torch.float32), *itertools.product([2, 32], HALF)]
)
@pytest.mark.parametrize("fault", PACKED_FAULTS)
def test_a_fault_of_packing_is_found_under_the_rounding(
    fault: str, layers: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    PACKED_FAULTS[fault](monkeypatch)
    problem = _problem(_deep_model(layers, dtype, 0.01))
    assert problem is not None
    assert "differ from the padded ones" in problem


def test_packed_rows_that_are_not_finite_are_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(model: nn.Module, inputs: ModelInput) -> Tensor:
        return scored_hidden(model, inputs) * (torch.nan if inputs.plan else 1)

    monkeypatch.setattr(packing_check, "scored_hidden", poisoned)
    assert "by nan nats" in str(_problem(tiny_model()))


def test_short_responses_are_checked_on_more_pairs() -> None:
    """Of one-token responses two pairs would be four numbers, whose mean is a matter of luck."""
    short = [TokenizedPair(row, [1, 5, 6], [7], [8]) for row in range(99)]
    sample = packing_check.sample_of(short)
    assert sum(sum(batch.scored_lengths(pair)) for pair in sample) == 64
    assert len(packing_check.sample_of(PAIRS[:1])) == 2


def test_no_more_pairs_are_checked_than_memory_is_sure_to_hold() -> None:
    long = [TokenizedPair(row, [1] * 900, [7], [8]) for row in range(99)]
    inputs = batch.policy_input(packing_check.sample_of(long), packing=False)
    assert 512 < inputs.input_ids.numel() <= 2048


# ---- what a model says that can't -----------------------------------------------------------


def _failing(error: BaseException | None = None) -> nn.Module:
    """A model that raises where it is given a packed row; None: out of torch's own code."""
    model = tiny_model()

    def fail(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        if "segment_plan" in kwargs:
            if error is not None:
                raise error
            nn.functional.embedding(torch.tensor([3]), torch.ones(3, 2))

    model.model.register_forward_pre_hook(fail, with_kwargs=True)
    return model


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        RecursionError("maximum recursion depth exceeded"),
        MemoryError(),
        AssertionError("ours"),
        KeyboardInterrupt(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_is_no_fault_of_the_model_passes_through(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        _problem(_failing(error))
    assert caught.value is error


@pytest.mark.parametrize(
    "error",
    [
        TypeError("forward() got an unexpected keyword argument 'segment_plan'"),
        ValueError("no such mask\nand a second line"),
        RuntimeError("The size of tensor a (4) must match the size of tensor b (5)"),
        KeyError("rope"),
        IndexError("index out of range in self"),
        AttributeError(),
        NotImplementedError("this attention reads no packed rows"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_a_model_cannot_do_is_told_in_one_line(error: Exception) -> None:
    problem = _problem(_failing(error))
    assert problem is not None
    first = str(error).split("\n")[0]
    assert problem.startswith(f"{type(error).__name__}: {first} (test_packing_check.py:")
    assert problem.endswith(" fail)")


def test_an_error_out_of_torch_is_placed_in_the_models_code() -> None:
    problem = str(_problem(_failing()))
    assert problem.startswith("IndexError: ")
    assert "(test_packing_check.py:" in problem
