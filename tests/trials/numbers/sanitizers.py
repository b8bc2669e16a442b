"""Check 42: the kernels under NVIDIA's compute-sanitizer.

The functions take the device, so that all but the card itself can be tried without one.
"""

from __future__ import annotations

import shutil
import subprocess
import sys

import torch

from rmipo_lite.ops import device_flag, library, linear_logps, native, pair_loss
from rmipo_lite.ops.reference import IGNORED, LogitTransform
from rmipo_lite.selftest.kernels import no_gpu
from tests.trials.runs.children import changed_environment, fresh_command
from tests.trials.scorecard import Check, Trials, expect

_TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


def no_sanitizer() -> str | None:
    """Why compute-sanitizer can't run, or None."""
    if no_gpu():
        return no_gpu()
    return None if shutil.which("compute-sanitizer") else "no compute-sanitizer on PATH"


def sanitizers(trials: Trials) -> None:
    """Check 42: every kernel under each of the four tools."""
    for trial in trials:
        with trial:
            tool = _TOOLS[trial.index]
            trial.tried = tool
            prefix = [
                "compute-sanitizer", "--tool", tool, "--error-exitcode", "9",
                "--kernel-name", "kns=rmipo",
            ]  # fmt: skip
            if tool == "memcheck":  # torch and cuBLAS try calls that may fail
                prefix += ["--report-api-errors", "no"]
            under_tool(tool, "cuda", prefix)


def under_tool(tool: str, device: str, prefix: list[str]) -> None:
    """Run the kernels in a process behind `prefix`; no report, and they did run."""
    done = subprocess.run(
        [*prefix, *fresh_command(run_kernels, tool, device)],
        # Each tensor in memory of its own, so that what lies past its end is nobody's.
        env=changed_environment({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}),
        capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=900, check=False,
    )  # fmt: skip
    text = done.stdout + done.stderr
    expect(done.returncode == 0, f"exit {done.returncode}: {text[-400:]}")
    expect("kernels ran" in text, f"the kernels did not run: {text[-400:]}")
    for line in text.splitlines():
        if "SUMMARY" in line:
            expect(" 0 errors" in line or " 0 hazards" in line, line)


def run_kernels(tool: str, device: str) -> None:
    """In the process under the tool: row work and pair losses of every kind and odd size."""
    found = library.status(device)
    expect(found.available, f"no kernels: {found.reason}")
    generator = torch.Generator().manual_seed(0)
    dtypes = [torch.float32, torch.float64]
    for dtype, vocab, softcap in ((d, v, c) for d in dtypes for v in (1, 33, 1025) for c in (0, 5)):
        values = torch.randn(4, vocab, generator=generator, dtype=dtype)
        ids = torch.tensor([0, vocab - 1, IGNORED, 2**40])
        bias = torch.randn(vocab, generator=generator, dtype=dtype).to(device)
        logits = values.to(device)
        native.row_logps(
            logits, ids.to(device), LogitTransform(bias, softcap or None, 0.5), None, logits
        )
        if device == "cpu":
            continue
        for low in (torch.bfloat16, torch.float16):
            grads = torch.empty(4, vocab, dtype=low, device=device)
            if dtype == torch.float32:
                native.row_logps(
                    values.to(device), ids.to(device), LogitTransform(bias, scale=0.5), None, grads
                )  # fmt: skip
    token_logps = -torch.rand(9, generator=generator)
    borders = torch.tensor([0, 2, 3, 7, 9], dtype=torch.int32).to(device)
    for loss_type in ("rmipo", "simpo", "hinge", "simper"):
        logps = token_logps.to(device)
        pair_loss(logps, borders, logps, borders, loss_type=loss_type, impl="native")
    # initcheck sees what copies and our kernels write, and not what the matrix products write.
    if tool != "initcheck":
        hidden = torch.randn(5, 8, generator=generator).to(device).requires_grad_()
        weight = torch.randn(33, 8, generator=generator).to(device)
        ids = torch.tensor([0, 32, IGNORED, 1, 2]).to(device)
        linear_logps(hidden, weight, ids, impl="native").sum().backward()
    if device != "cpu":
        torch.cuda.synchronize()
        expect(int(device_flag(torch.device(device, 0))) == 1, "the bad target was not flagged")
    sys.stdout.write("kernels ran\n")


CHECKS = [Check(42, "kernels under compute-sanitizer", 4, sanitizers, least=4, absent=no_sanitizer)]
