"""The operators as this machine computes them: against float64, registered, the same bits twice."""

import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rmipo_lite.ops import linear_logps, pair_loss, status
from rmipo_lite.ops.devices import accelerator, has_float64, is_nvidia
from rmipo_lite.ops.reference import IGNORED
from rmipo_lite.selftest.check import Case, Check, Lost, expect
from rmipo_lite.selftest.parts import (
    equal_weights,
    random_pairs,
    tiny_model,
    tiny_trainer,
    trained_weights,
)

_LOSSES = ("rmipo", "simpo", "hinge", "simper")
_BORDERS = torch.tensor([0, 2, 3, 7, 9], dtype=torch.int32)  # of two pairs
_CAP, _SCALE = 30.0, 0.5
# Of the largest number: float32 sums inside, and 16-bit products where the inputs have 16 bits.
_ERRORS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
_SHAPES = ((0, 7), (1, 1), (17, 97), (300, 2049), (3, 151_936))  # rows, vocabulary

_LARGE = (600, 40_000)  # several chunks, and longer sums than some GPUs get right


def no_gpu() -> str | None:
    """Why nothing can run on an NVIDIA GPU, or None."""
    has_one = torch.cuda.is_available() and is_nvidia("cuda")
    return None if has_one else "no NVIDIA GPU on this machine"


def no_accelerator() -> str | None:
    """Why nothing can run on a GPU of any kind, or None."""
    return None if accelerator() else "no GPU on this machine"


def against_float64(device: str, _folder: Path, seed: int) -> Iterator[Case]:
    """Values and gradients of `linear_logps` and `pair_loss`, beside plain float64."""
    torch.manual_seed(seed)
    found = status(device)
    kind = found.kind or f"plain PyTorch, {found.reason}"
    dtypes = [d for d in _ERRORS if d != torch.float64 or has_float64(torch.device(device))]
    shapes = _SHAPES if device == "cpu" else (*_SHAPES, _LARGE)
    for dtype, shape, trained in itertools.product(dtypes, shapes, (False, True)):
        text = f"head ({kind}), {shape[0]} rows of {shape[1]}, {dtype}, trained {trained}"
        yield text, partial(_compare_head, device, dtype, *shape, trained)
    for dtype, loss in itertools.product({torch.float32, dtypes[0]}, _LOSSES):
        yield f"loss ({kind}), {loss}, {dtype}", partial(_compare_pairs, device, dtype, loss)


def on_the_gpu(folder: Path, seed: int) -> Iterator[Case]:
    """The same on the kind of GPU that a run takes."""
    yield from against_float64(accelerator() or "cpu", folder, seed)


def _compare_head(device: str, dtype: torch.dtype, rows: int, vocab: int, trained: bool) -> None:
    """A head with bias, scale and softcap; one row is not scored."""
    shapes = ((rows, 24), (vocab, 24), (vocab,))
    leaves = [torch.randn(shape).div(2).to(device, dtype) for shape in shapes]
    ids = torch.randint(0, vocab, (rows,))
    ids[1:2] = IGNORED
    for leaf in leaves if trained else leaves[:1]:
        leaf.requires_grad_()
    hidden, weight, bias = leaves
    logps = linear_logps(
        hidden, weight, ids.to(device), bias=bias, logit_softcap=_CAP, logit_scale=_SCALE
    )
    logps.sum().backward()
    exact = [leaf.detach().cpu().double().requires_grad_() for leaf in leaves]
    logits = _CAP * torch.tanh((exact[0] @ exact[1].T + exact[2]) * _SCALE / _CAP)
    scored = ids != IGNORED
    want = logits.log_softmax(-1).gather(1, ids.where(scored, 0)[:, None])[:, 0] * scored
    want.sum().backward()
    _expect_close("log-probs", logps, want, dtype)
    for name, leaf, other in zip(("hidden", "weight", "bias"), leaves, exact, strict=True):
        if leaf.requires_grad:
            _expect_close(f"gradient of {name}", leaf.grad, other.grad, dtype)


def _compare_pairs(device: str, dtype: torch.dtype, loss_type: str) -> None:
    logps, prior = -5 * torch.rand(2, 9, dtype=dtype)
    results = []
    for place, kind, impl in ((device, dtype, "auto"), ("cpu", torch.float64, "torch")):
        leaf, borders = logps.to(place, kind, copy=True).requires_grad_(), _BORDERS.to(place)
        options: dict[str, Any] = {"loss_type": loss_type, "impl": impl}
        out = pair_loss(leaf, borders, prior.to(place, kind), borders, **options)
        out.loss.sum().backward()
        results.append((out.loss, leaf.grad))
    for name, got, want in zip(("loss", "gradient"), *results, strict=True):
        _expect_close(name, got, want, dtype)


def _expect_close(name: str, got: Tensor | None, want: Tensor | None, dtype: torch.dtype) -> None:
    if got is None or want is None:
        raise Lost(f"{name}: there is none")
    size, error = (float(x.abs().max()) if x.numel() else 0.0 for x in (want, got.cpu() - want))
    allowed = _ERRORS[dtype] * (1 + size)
    expect(error <= allowed, f"{name} off by {error:.1e}, allowed {allowed:.1e}")


def registration(_folder: Path, seed: int) -> Iterator[Case]:
    """Finite differences, and torch's own check of schema, tracing and gradient formula."""
    torch.manual_seed(seed)
    ids = torch.tensor([0, 12, IGNORED, 5])
    ops, check = torch.ops.rmipo_lite, torch.library.opcheck
    for mode in range(3):  # values alone, a fixed head, a trained head
        hidden, weight = torch.randn(4, 3), torch.randn(13, 3)
        leaves = hidden.requires_grad_(mode > 0), weight.requires_grad_(mode == 2)
        head = (*leaves, ids, torch.randn(13), _CAP, _SCALE, mode, "auto")
        yield f"linear_logps, mode {mode}", partial(check, ops.linear_logps, head)
    for name in _LOSSES:
        logps, prior = (-torch.rand(9)).requires_grad_(), -torch.rand(9)
        constants = (name, 2.0, 0.3, 1.6, False, 0.0, 0.5, "auto")
        loss = (logps, _BORDERS, prior, _BORDERS, *constants)
        yield f"pair_loss {name}", partial(check, ops.pair_loss, loss)
    pair = [torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (4, 13)]
    logps_of = partial(linear_logps, target_ids=ids, logit_softcap=3.0)
    yield "finite differences", partial(torch.autograd.gradcheck, logps_of, pair)


def same_bits(folder: Path, seed: int) -> Iterator[Case]:
    """Two runs of one seed, and two calls of the head with as many threads."""
    yield "three steps of training", partial(_train_twice, folder, seed)
    for threads, dtype in itertools.product((1, 2), (torch.float32, torch.bfloat16)):
        yield f"head, {threads} threads, {dtype}", partial(_head_twice, threads, dtype)


def _train_twice(folder: Path, seed: int) -> None:
    runs = []
    for name in "ab":
        trainer = tiny_trainer(
            folder / name, model=tiny_model(attention_dropout=0.1), pairs=random_pairs(12, seed),
            max_steps=3, disable_dropout=False,
        )  # fmt: skip
        trainer.train()
        runs.append(trained_weights(trainer))
    expect(equal_weights(*runs), "two runs differ")


def _head_twice(threads: int, dtype: torch.dtype) -> None:
    hidden, weight = torch.randn(300, 128).to(dtype), torch.randn(12_000, 128).to(dtype)
    torch.set_num_threads(threads)
    grads: list[Tensor] = []
    for leaf in (hidden.clone().requires_grad_() for _ in "ab"):
        logps = linear_logps(leaf, weight, torch.arange(300))
        grads += torch.autograd.grad(logps.sum(), leaf)
    torch.set_num_threads(1)
    expect(torch.equal(*grads), "two gradients differ")


CHECKS = [
    Check(4, "operators against float64", partial(against_float64, "cpu")),
    Check(4, "GPU: operators against float64", on_the_gpu, no_accelerator),
    Check(22, "operators as registered with torch", registration),
    Check(24, "same seed, same bits, with one thread and with two", same_bits),
]
