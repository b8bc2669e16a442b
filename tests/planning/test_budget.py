from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from rmipo_lite.adapters.base_model import causal_lm
from rmipo_lite.config import RMiPOConfig
from rmipo_lite.ops import CPU_BUFFER_BYTES
from rmipo_lite.planning import budget, device
from rmipo_lite.planning.budget import Checkpointing, is_out_of_memory, plan_micro_steps
from rmipo_lite.planning.footprint import Activations, activations_of, setup_of
from tests.kit import tiny_model


def _args(tmp_path: Path, **options: object) -> RMiPOConfig:
    return RMiPOConfig(str(tmp_path), use_cpu=True, **options)


def _free(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    monkeypatch.setattr(budget, "free_bytes", lambda device: nbytes)


def test_a_number_is_taken_as_it_is(tmp_path: Path) -> None:
    plan = plan_micro_steps(tiny_model(), _args(tmp_path, max_tokens_per_microstep=77), 50)
    assert (plan.max_tokens, plan.max_tokens_no_grad) == (77, 77)
    assert plan.checkpointing.asked is False


def _free_for(model: nn.Module, args: RMiPOConfig, tokens: float) -> int:
    """Free memory that leaves room for so many tokens without checkpointing."""
    count = activations_of(causal_lm(model).config, setup_of(model, args.dtype), False)
    return int(budget.fixed_bytes(model, args) + count.bytes_of(tokens) / 0.6)


def test_auto_follows_the_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, args = tiny_model(), _args(tmp_path)
    _free(monkeypatch, 2**40)
    assert plan_micro_steps(model, args, 100).max_tokens == 4096  # more doesn't pay on a CPU
    _free(monkeypatch, _free_for(model, args, 1000.5))
    plan = plan_micro_steps(model, args, 100)
    assert plan.max_tokens == 1000
    assert 1500 < plan.max_tokens_no_grad <= 4096  # a pass that keeps nothing has room for more
    assert plan.checkpointing.asked is False


def test_checkpointing_only_where_a_micro_step_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, args = tiny_model(num_hidden_layers=4), _args(tmp_path)
    _free(monkeypatch, _free_for(model, args, 700.5))
    assert plan_micro_steps(model, args, 700).checkpointing.asked is False
    needed = plan_micro_steps(model, args, 900)
    assert needed.max_tokens == 700
    layers = [needed.checkpointing.layers_of(tokens) for tokens in (100, 700, 702, 1000, 9000)]
    assert layers[:3] == [0, 0, 1]
    assert 1 < layers[3] <= layers[4] == 4
    # Pairs that are short never have it: a micro-step of theirs is cut to what fits.
    _free(monkeypatch, _free_for(model, args, 300.5))
    short = plan_micro_steps(model, args, 100)
    assert (short.max_tokens, short.checkpointing.asked) == (300, False)
    number = _args(tmp_path, max_tokens_per_microstep=4000, per_device_train_batch_size=2)
    assert plan_micro_steps(model, number, 20).checkpointing.asked is False
    assert plan_micro_steps(model, number, 250).checkpointing.layers_of(500) > 0
    _free(monkeypatch, _free_for(model, args, 700.5))
    # A word of the user's is the last one, and a sharded model's processes have to do it alike.
    for options, longest, wanted in (
        ({"gradient_checkpointing": False}, 900, 0), ({"gradient_checkpointing": True}, 5, 4),
    ):  # fmt: skip
        plan = plan_micro_steps(model, _args(tmp_path, **options), longest)
        assert {plan.checkpointing.layers_of(tokens) for tokens in (5, 900)} == {wanted}
    args.shards_layers = True
    alike = plan_micro_steps(model, args, 900)
    assert alike.checkpointing.asked is True
    assert alike.max_tokens > 900


def test_layers_by_hand() -> None:
    """A token takes 10 bytes, 2 computed again; of 4 layers each saves 2 of the 8."""
    plan = Checkpointing(4, Activations(0, 10, True), Activations(0, 2, True), 100, None)
    assert [plan.layers_of(tokens) for tokens in (10, 11, 12.5, 13, 20, 50, 60)] == [
        0, 1, 1, 2, 3, 4, 4,
    ]  # fmt: skip
    assert [plan.bytes_of(tokens) for tokens in (10, 12.5, 20, 50)] == [100, 100, 80, 100]


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
    assert plan_micro_steps(model, _args(tmp_path), 700).checkpointing.asked is False


def test_free_memory_is_a_plausible_number() -> None:
    assert 2**26 < device.free_bytes(torch.device("cpu")) < 2**50


@pytest.mark.cuda
def test_auto_on_a_gpu_stays_below_its_memory(tmp_path: Path) -> None:
    model, args = tiny_model().cuda(), RMiPOConfig(str(tmp_path))
    tokens = plan_micro_steps(model, args, 100).max_tokens
    free, _ = torch.cuda.mem_get_info()
    assert 512 <= tokens <= 32768
    count = activations_of(model.config, setup_of(model, args.dtype), False)
    assert count.bytes_of(tokens) < free


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
