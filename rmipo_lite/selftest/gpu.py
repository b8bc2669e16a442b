"""What only a card shows: streams, devices, memory that runs out.

The functions take the device, so that all but the card itself can be tried without one.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rmipo_lite.config import RMiPOConfig
from rmipo_lite.ops import linear_logps, pair_loss
from rmipo_lite.selftest.check import Case, Check, expect
from rmipo_lite.selftest.kernels import no_gpu
from rmipo_lite.selftest.parts import random_pairs, tiny_model
from rmipo_lite.step.pair_step import PairStep
from rmipo_lite.step.pair_values import StepOutcome

Backward = Callable[[Tensor], None]


def streams_and_memory(folder: Path, _seed: int) -> Iterator[Case]:
    """A stream of one's own behind a long kernel, another device, memory that runs out."""
    stream = torch.cuda.stream(torch.cuda.Stream())
    long_kernel = partial(torch.cuda._sleep, 10**9)
    yield "side stream", partial(behind_a_long_kernel, "cuda", stream, long_kernel)
    if torch.cuda.device_count() > 1:
        yield "cuda:1", partial(behind_a_long_kernel, "cuda:1", nullcontext(), lambda: None)
    args = RMiPOConfig(str(folder), bf16=False, fp16=False)
    yield "a step that runs out of memory", partial(out_of_memory, "cuda", args)


def behind_a_long_kernel(
    device: str, stream: AbstractContextManager[Any], long_kernel: Callable[[], object]
) -> None:
    """Inputs that are there only when the long kernel is done: the operators must wait."""
    sources = torch.randn(64, 32), torch.randn(999, 32), torch.randint(0, 999, (64,))
    want = _logps_and_grad(*sources)
    hidden, weight, ids = (source.to(device) for source in sources)
    with stream:
        late = torch.zeros_like(hidden), torch.zeros_like(weight)
        long_kernel()
        late[0].copy_(hidden)
        late[1].copy_(weight)
        got = _logps_and_grad(*late, ids)
    for name, a, b in zip(("logps", "gradients"), got, want, strict=True):
        expect(torch.allclose(a, b, atol=1e-4, rtol=1e-3), f"{name} differ")


def _logps_and_grad(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    leaf = hidden.detach().requires_grad_()
    logps = linear_logps(leaf, weight, ids)
    borders = torch.arange(0, 65, 16, dtype=torch.int32, device=ids.device)
    loss = pair_loss(logps, borders, logps.detach(), borders).loss
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    return logps.detach().cpu(), grad.cpu()


def out_of_memory(device: str, args: RMiPOConfig, backward: Backward = Tensor.backward) -> None:
    """A step whose memory is short (on the CPU `backward` says so) against one with enough."""
    model: Any = tiny_model(hidden_size=128, intermediate_size=512, max_position_embeddings=512)
    step = PairStep(model.to(device), args, 10**6, packing=True)
    whole, wanted = _train(step)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        _train(step)
        needed = torch.cuda.max_memory_allocated() - held
        share = (held + 0.7 * needed) / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(share)
    try:
        split, got = _train(step, backward)
    finally:
        if device != "cpu":
            torch.cuda.set_per_process_memory_fraction(1.0)
    expect(step.max_tokens < 10**6, "nothing ran out")
    expect(split.num_pairs == whole.num_pairs and not split.dropped, "pairs were lost")
    expect(abs(float(split.loss - whole.loss)) < 1e-4, "the loss differs")
    for name, grad in got.items():
        close = torch.allclose(grad, wanted[name], atol=1e-4, rtol=1e-3)
        expect(close, f"the gradient of {name} differs")


def _train(
    step: PairStep, backward: Backward = Tensor.backward
) -> tuple[StepOutcome, dict[str, Tensor]]:
    outcome = step.train(random_pairs(16, longest=200), backward)
    grads = {n: p.grad.cpu() for n, p in step.model.named_parameters() if p.grad is not None}
    step.model.zero_grad()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return outcome, grads


CHECKS = [Check(43, "GPU: side stream, second device, out of memory", streams_and_memory, no_gpu)]
