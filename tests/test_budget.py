from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rmipo_lite import batch, budget, device_memory
from rmipo_lite.budget import (
    MicroStepPlan,
    activation_bytes_per_token,
    is_out_of_memory,
    plan_micro_steps,
)
from rmipo_lite.config import RMiPOConfig
from rmipo_lite.loading import attach_adapter
from rmipo_lite.model import scored_hidden
from rmipo_lite.selftest.parts import random_pairs, tiny_model
from rmipo_lite.step import PairStep


def _args(tmp_path: Path, **options: object) -> RMiPOConfig:
    return RMiPOConfig(str(tmp_path), use_cpu=True, **options)


def _free(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    monkeypatch.setattr(budget, "free_bytes", lambda device: nbytes)


def test_a_number_is_taken_as_it_is(tmp_path: Path) -> None:
    plan = plan_micro_steps(tiny_model(), _args(tmp_path, max_tokens_per_microstep=77), 50)
    assert plan == MicroStepPlan(max_tokens=77, checkpointing=False)


def test_auto_follows_the_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, args = tiny_model(), _args(tmp_path)
    _free(monkeypatch, 2**40)
    assert plan_micro_steps(model, args, 100).max_tokens == 4096  # more doesn't pay on a CPU
    per_token = activation_bytes_per_token(model, args, False)
    _free(monkeypatch, int((budget.fixed_bytes(model) + 1000.5 * per_token) / 0.6))
    plan = plan_micro_steps(model, args, 100)
    assert plan.max_tokens == 1000
    assert not plan.checkpointing


def test_checkpointing_only_where_the_longest_pair_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, args = tiny_model(), _args(tmp_path)
    per_token = activation_bytes_per_token(model, args, False)
    _free(monkeypatch, int((budget.fixed_bytes(model) + 700.5 * per_token) / 0.6))
    assert not plan_micro_steps(model, args, 700).checkpointing
    needed = plan_micro_steps(model, args, 701)
    assert needed.checkpointing
    assert needed.max_tokens > 700  # and with it there is room for more
    # A word of the user's is the last one.
    assert not plan_micro_steps(
        model, _args(tmp_path, gradient_checkpointing=False), 701
    ).checkpointing
    assert plan_micro_steps(model, _args(tmp_path, gradient_checkpointing=True), 5).checkpointing


def test_activations_by_hand(tmp_path: Path) -> None:
    """2 layers of (16 * 32 + 5 * 48) floats of 4 bytes; checkpointed, 2 inputs and one block."""
    args, block = _args(tmp_path), 16 * 32 + 5 * 48
    assert activation_bytes_per_token(tiny_model(), args, False) == 2 * block * 4
    assert activation_bytes_per_token(tiny_model(), args, True) == (2 * 32 + block) * 4


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("inner", [64, 512])
def test_the_count_bounds_what_autograd_keeps(bf16: bool, inner: int, tmp_path: Path) -> None:
    """Measured by collecting every tensor saved for backward: below the count, above half of it."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    config = LlamaConfig(
        vocab_size=97, hidden_size=128, intermediate_size=inner, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, dtype=dtype,
    )  # fmt: skip
    model = attach_adapter(LlamaForCausalLM(config).to(dtype), "new").train()
    args = _args(tmp_path, bf16=bf16)
    step = PairStep(
        model, args, 10**6, packing=True,
        autocast=lambda: torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    )  # fmt: skip
    inputs = batch.policy_input(random_pairs(4, longest=200), packing=True)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with step._engaged(), step.autocast(), hooks:
        hidden = scored_hidden(model, inputs)
    assert hidden.requires_grad
    kept = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    count = activation_bytes_per_token(model, args, False) * inputs.num_tokens
    assert 0.5 * count < kept < count


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


def test_a_container_gives_up_its_cached_files(tmp_path: Path) -> None:
    assert device_memory._left_in_container(tmp_path) is None
    (tmp_path / "memory.max").write_text("32000\n")
    (tmp_path / "memory.current").write_text("30000\n")
    (tmp_path / "memory.stat").write_text("anon 6000\nfile 24000\nfile_mapped 7\n")
    assert device_memory._left_in_container(tmp_path) == 26000
    (tmp_path / "memory.max").write_text("max\n")
    assert device_memory._left_in_container(tmp_path) is None


def test_a_model_that_cannot_checkpoint_is_not_asked_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    model.supports_gradient_checkpointing = False
    _free(monkeypatch, 0)
    assert not plan_micro_steps(model, _args(tmp_path), 700).checkpointing


def test_free_memory_is_a_plausible_number() -> None:
    assert 2**26 < device_memory.free_bytes(torch.device("cpu")) < 2**50


@pytest.mark.cuda
def test_auto_on_a_gpu_stays_below_its_memory(tmp_path: Path) -> None:
    model, args = tiny_model().cuda(), RMiPOConfig(str(tmp_path))
    tokens = plan_micro_steps(model, args, 100).max_tokens
    free, _ = torch.cuda.mem_get_info()
    assert 512 <= tokens <= 32768
    assert tokens * activation_bytes_per_token(model, args, False) < free


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
    assert device_memory.free_bytes(torch.device("cuda")) == free * giga
