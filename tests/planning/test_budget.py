from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from rmipo_lite.config import RMiPOConfig
from rmipo_lite.ops import CPU_BUFFER_BYTES
from rmipo_lite.planning import budget, device
from rmipo_lite.planning.budget import MicroStepPlan, is_out_of_memory, plan_micro_steps
from tests.kit import tiny_model


def _args(tmp_path: Path, **options: object) -> RMiPOConfig:
    return RMiPOConfig(str(tmp_path), use_cpu=True, **options)


def _free(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    monkeypatch.setattr(budget, "free_bytes", lambda device: nbytes)


def test_a_number_is_taken_as_it_is(tmp_path: Path) -> None:
    plan = plan_micro_steps(tiny_model(), _args(tmp_path, max_tokens_per_microstep=77), 50)
    assert plan == MicroStepPlan(max_tokens=77, checkpointing=False)


def _free_for(model: nn.Module, args: RMiPOConfig, tokens: float) -> int:
    """Free memory that leaves room for so many tokens without checkpointing."""
    per_step = budget.activations(model, args, False).bytes_of(tokens)
    return int(budget.fixed_bytes(model, args) + per_step / 0.6)


def test_auto_follows_the_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, args = tiny_model(), _args(tmp_path)
    _free(monkeypatch, 2**40)
    assert plan_micro_steps(model, args, 100).max_tokens == 4096  # more doesn't pay on a CPU
    _free(monkeypatch, _free_for(model, args, 1000.5))
    plan = plan_micro_steps(model, args, 100)
    assert plan.max_tokens == 1000
    assert not plan.checkpointing


def test_checkpointing_only_where_the_longest_pair_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, args = tiny_model(), _args(tmp_path)
    _free(monkeypatch, _free_for(model, args, 700.5))
    assert not plan_micro_steps(model, args, 700).checkpointing
    needed = plan_micro_steps(model, args, 701)
    assert needed.checkpointing
    assert needed.max_tokens > 700  # and with it there is room for more
    # A word of the user's is the last one.
    assert not plan_micro_steps(
        model, _args(tmp_path, gradient_checkpointing=False), 701
    ).checkpointing
    assert plan_micro_steps(model, _args(tmp_path, gradient_checkpointing=True), 5).checkpointing


def test_what_is_trained_takes_gradient_and_moments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "use_native", lambda impl, device: impl != "torch")
    model = tiny_model()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    for optimizer, width in (("adamw_torch", 8), ("adamw_8bit", 2), ("sgd", 0)):
        args = _args(tmp_path, optim=optimizer)
        assert budget.fixed_bytes(model, args) == trained * (4 + width) + CPU_BUFFER_BYTES
    # Without the kernels a chunk's 256 rows of logits, in five copies.
    plain = budget.fixed_bytes(model, _args(tmp_path, optim="sgd", kernel_impl="torch"))
    assert plain == trained * 4 + 5 * 4 * 256 * model.config.vocab_size


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 12"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be late"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. Is the input contiguous?"), False),
        (RuntimeError("shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: BaseException, wanted: bool) -> None:
    assert is_out_of_memory(error) is wanted


def test_what_the_cpu_allocator_raises_counts() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_a_model_that_cannot_checkpoint_is_not_asked_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    model.supports_gradient_checkpointing = False
    _free(monkeypatch, 0)
    assert not plan_micro_steps(model, _args(tmp_path), 700).checkpointing


def test_free_memory_is_a_plausible_number() -> None:
    assert 2**26 < device.free_bytes(torch.device("cpu")) < 2**50


@pytest.mark.cuda
def test_auto_on_a_gpu_stays_below_its_memory(tmp_path: Path) -> None:
    model, args = tiny_model().cuda(), RMiPOConfig(str(tmp_path))
    tokens = plan_micro_steps(model, args, 100).max_tokens
    free, _ = torch.cuda.mem_get_info()
    assert 512 <= tokens <= 32768
    assert budget.activations(model, args, False).bytes_of(tokens) < free


@pytest.mark.parametrize(("share", "free"), [(1.0, 61), (0.1, 4), (0.01, 0)])
def test_a_process_that_is_limited_to_a_share_of_the_card_knows_it(
    share: float, free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """80 GB, 60 free; torch holds 5 of which 4 are used."""
    giga = 10**9
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 * giga, 80 * giga))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5 * giga)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 4 * giga)
    monkeypatch.setattr(torch.cuda.memory, "get_per_process_memory_fraction", lambda device: share)
    assert device.free_bytes(torch.device("cuda")) == free * giga
