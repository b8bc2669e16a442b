"""What is meant for a GPU, tried on the CPU: it holds, and finds what is planted."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from rmipo_lite.config import RMiPOConfig
from rmipo_lite.selftest import gpu
from rmipo_lite.selftest.check import Lost
from rmipo_lite.step import micro_steps


def test_inputs_that_come_late(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.behind_a_long_kernel("cpu", nullcontext(), lambda: None)
    real = gpu.linear_logps

    def too_early(hidden, weight, ids):
        calls.append(1)
        return real(hidden * (len(calls) == 1), weight, ids)

    calls: list[int] = []
    monkeypatch.setattr(gpu, "linear_logps", too_early)
    with pytest.raises(Lost, match="logps differ"):
        gpu.behind_a_long_kernel("cpu", nullcontext(), lambda: None)


def test_memory_that_runs_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = RMiPOConfig(str(tmp_path), use_cpu=True)
    gpu.out_of_memory("cpu", args, _failing_once(before=True))
    with pytest.raises(Lost, match="nothing ran out"):
        gpu.out_of_memory("cpu", args)
    # A step that goes on with what the failed attempt had added up.
    monkeypatch.setattr(micro_steps, "clear_gradients", lambda model: None)
    with pytest.raises(Lost, match="gradient of"):
        gpu.out_of_memory("cpu", args, _failing_once(before=False))


def _failing_once(before: bool):
    """A backward pass that runs out of memory the first time, with or without a gradient made."""
    failed: list[int] = []

    def run(loss: torch.Tensor) -> None:
        if failed or not before:
            loss.backward()
        if not failed:
            failed.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    return run
