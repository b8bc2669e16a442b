"""What only a GPU shows: sanitizers, streams, devices, memory that runs out.

The functions take the device, so that all but the GPU itself can be tried without one.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from rmipo_lite.config import RMiPOConfig
from rmipo_lite.ops import device_flag, library, linear_logps, native, pair_loss
from rmipo_lite.ops.reference import IGNORED, LogitTransform
from rmipo_lite.selftest.children import changed_environment, fresh_command
from rmipo_lite.selftest.parts import random_pairs, tiny_model
from rmipo_lite.selftest.scorecard import Check, Trials, expect
from rmipo_lite.training.step import PairStep, StepOutcome

_TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


def no_gpu() -> str | None:
    """Why nothing can run on a GPU, or None."""
    return None if torch.cuda.is_available() else "no NVIDIA GPU on this machine"


def no_second_gpu() -> str | None:
    """Why there is no second device, or None."""
    return no_gpu() or (None if torch.cuda.device_count() > 1 else "one GPU alone")


def no_sanitizer() -> str | None:
    """Why compute-sanitizer can't run, or None."""
    if no_gpu():
        return no_gpu()
    return None if shutil.which("compute-sanitizer") else "no compute-sanitizer on PATH"


# ---- compute-sanitizer ------------------------------------------------------------------------


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


# ---- streams, devices, memory -----------------------------------------------------------------


def streams_and_memory(trials: Trials) -> None:
    """Check 43: a stream of one's own behind a long kernel; a step that runs out of memory."""
    for trial in trials:
        with trial:
            if trial.index == 0:
                trial.tried = "side stream behind a long kernel"
                side = torch.cuda.Stream()
                behind_a_long_kernel(
                    "cuda", torch.cuda.stream(side), lambda: torch.cuda._sleep(10**9)
                )
                side.synchronize()
            else:
                trial.tried = "a step that runs out of memory"
                out_of_memory("cuda", RMiPOConfig(str(trial.folder), bf16=False, fp16=False))


def second_device(trials: Trials) -> None:
    """Check 43: tensors on another device than the current one."""
    for trial in trials:
        with trial:
            trial.tried = "tensors on cuda:1, cuda:0 is current"
            torch.cuda.set_device(0)
            behind_a_long_kernel("cuda:1", nullcontext(), lambda: None)
            expect(torch.cuda.current_device() == 0, "the current device is another one now")


def behind_a_long_kernel(
    device: str, stream: AbstractContextManager[Any], long_kernel: Callable[[], object]
) -> None:
    """Inputs that are there only when the long kernel is done; the operators must wait for it."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 32, generator=generator)
    weight = torch.randn(999, 32, generator=generator)
    ids = torch.randint(0, 999, (64,), generator=generator)
    borders = torch.arange(0, 65, 16, dtype=torch.int32)
    want = _logps_loss_grad(hidden, weight, ids, borders)
    ids, borders = ids.to(device), borders.to(device)
    sources = hidden.to(device), weight.to(device)
    inputs = torch.zeros_like(sources[0]), torch.zeros_like(sources[1])
    with stream:
        long_kernel()
        inputs[0].copy_(sources[0])
        inputs[1].copy_(sources[1])
        got = [result.cpu() for result in _logps_loss_grad(*inputs, ids, borders)]
    for name, a, b in zip(("logps", "loss", "gradient"), got, want, strict=True):
        expect(torch.allclose(a, b, atol=1e-4, rtol=1e-3), f"{name} differ")


def _logps_loss_grad(
    hidden: Tensor, weight: Tensor, ids: Tensor, borders: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    leaf = hidden.detach().requires_grad_()
    logps = linear_logps(leaf, weight, ids)
    loss = pair_loss(logps, borders, logps.detach(), borders).loss
    loss.sum().backward()
    assert leaf.grad is not None
    return logps.detach(), loss.detach(), leaf.grad


def out_of_memory(device: str, args: RMiPOConfig) -> None:
    """A step whose memory is short against the same step with enough."""
    model: nn.Module = tiny_model(
        hidden_size=128, intermediate_size=512, max_position_embeddings=512
    )  # fmt: skip
    model.to(device)
    pairs = random_pairs(16, longest=200)
    step = PairStep(model, args, 10**6, packing=True)
    on_card = device != "cpu"
    if on_card:
        _train(step, lambda loss: loss.backward())  # makes what a first step alone makes
        model.zero_grad()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    whole, wanted = _train(step, lambda loss: loss.backward())
    backward: Callable[[Tensor], None] = lambda loss: loss.backward()  # noqa: E731
    if on_card:
        needed = torch.cuda.max_memory_allocated() - held
        total = torch.cuda.get_device_properties(0).total_memory
        model.zero_grad()
        torch.cuda.empty_cache()
        share = (torch.cuda.memory_reserved() + 0.7 * needed) / total
        torch.cuda.set_per_process_memory_fraction(share)
    else:
        backward = _failing_once(backward)
    try:
        split, got = _train(step, backward)
    finally:
        if on_card:
            torch.cuda.set_per_process_memory_fraction(1.0)
    expect(step.max_tokens < 10**6, "nothing ran out")
    expect(split.num_pairs == len(pairs) and not split.dropped, "pairs were lost")
    difference = abs(float(split.loss - whole.loss))
    expect(difference < 1e-4, f"the loss differs by {difference:.2g}")
    for name, grad in got.items():
        close = torch.allclose(grad, wanted[name], atol=1e-4, rtol=1e-3)
        expect(close, f"the gradient of {name} differs")


def _train(
    step: PairStep, backward: Callable[[Tensor], None]
) -> tuple[StepOutcome, dict[str, Tensor]]:
    model: nn.Module = step.model
    model.zero_grad()
    outcome = step.train(random_pairs(16, longest=200), backward)
    named = model.named_parameters()
    return outcome, {name: p.grad.clone() for name, p in named if p.grad is not None}


def _failing_once(backward: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    failed: list[bool] = []

    def run(loss: Tensor) -> None:
        if not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        backward(loss)

    return run


CHECKS = [
    Check(42, "kernels under compute-sanitizer", 4, sanitizers, 0, least=4, absent=no_sanitizer),
    Check(43, "GPU: side stream, out of memory", 2, streams_and_memory, least=2, absent=no_gpu),
    Check(43, "GPU: a second device", 1, second_device, absent=no_second_gpu),
]
