"""What is meant for a GPU, tried on the CPU: it holds, and finds what is planted."""

from __future__ import annotations

import random
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from tests.trials.scorecard import Lost

from rmipo_lite.config import RMiPOConfig
from rmipo_lite.ops import library, native
from rmipo_lite.selftest import gpu
from tests.trials.numbers import addresses


@pytest.fixture(autouse=True)
def _kernels() -> None:
    if not library.status("cpu").available:
        pytest.skip(f"no kernels on the CPU: {library.status('cpu').reason}")


def test_addresses(try_check) -> None:
    if addresses.no_bindings():
        pytest.skip(str(addresses.no_bindings()))
    assert [(loss.tried, loss.message) for loss in try_check(41, 0, 7).losses] == []


def test_rows_of_32_bit_offsets_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = native.row_logps

    def row_logps(logits, *rest):
        wrapped = [row * logits.stride(0) % 2**31 // logits.stride(0) for row in range(3)]
        return real(logits[torch.tensor(wrapped)], *rest[:-1], None)

    addresses.rows_apart(torch.empty(3000), 1000, 1000, random.Random(0))
    far = 2**30
    monkeypatch.setattr(native, "row_logps", row_logps)
    with pytest.raises(Lost):
        addresses.rows_apart(addresses._memory(2 * far + 1000), far, 1000, random.Random(0))


def test_one_call_over_all_rows() -> None:
    addresses.dense_rows("cpu", 100, 333, random.Random(1))


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "initcheck"])
def test_the_kernels_behind_a_tool(tool: str) -> None:
    gpu.under_tool(tool, "cpu", [])


def test_what_a_tool_reports_is_found() -> None:
    report = [sys.executable, "-c", "print('ERROR SUMMARY: 3 errors'); print('kernels ran')"]
    with pytest.raises(Lost, match="3 errors"):
        gpu.under_tool("memcheck", "cpu", report)
    with pytest.raises(Lost, match="did not run"):
        gpu.under_tool("memcheck", "cpu", ["true"])


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
    gpu.out_of_memory("cpu", args)
    # A step that goes on with what the failed attempt had added up.
    monkeypatch.setattr(gpu.PairStep, "_clear_gradients", lambda self: None)
    monkeypatch.setattr(gpu, "_failing_once", _failing_after)
    with pytest.raises(Lost, match="gradient of"):
        gpu.out_of_memory("cpu", args)


def _failing_after(backward):
    failed: list[int] = []

    def run(loss):
        backward(loss)
        if not failed:
            failed.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    return run
