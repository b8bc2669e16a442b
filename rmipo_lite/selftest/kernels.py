"""The operators as this machine computes them: against float64, registered, the same bits twice."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rmipo_lite.ops import linear_logps, pair_loss, status
from rmipo_lite.ops.reference import IGNORED
from rmipo_lite.selftest.check import Case, Check, expect
from rmipo_lite.selftest.parts import (
    equal_weights,
    random_pairs,
    tiny_model,
    tiny_trainer,
    trained_weights,
)

_LOSSES = ("rmipo", "simpo", "hinge", "simper")
_CAP, _SCALE = 30.0, 0.5
# Of the largest number: float32 sums inside, and 16-bit products where the inputs have 16 bits.
_ERRORS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
_SHAPES = ((0, 7), (1, 1), (17, 97), (300, 2049), (3, 151_936))  # rows, vocabulary


def no_gpu() -> str | None:
    """Why nothing can run on a card, or None."""
    return None if torch.cuda.is_available() else "no NVIDIA GPU on this machine"


# ---- 4: against float64 ---------------------------------------------------------------------


def against_float64(device: str, _folder: Path, seed: int) -> Iterator[Case]:
    """Values and gradients of `linear_logps` and `pair_loss`, beside plain float64."""
    found = status(device)
    kind = found.kind or f"plain PyTorch, {found.reason}"
    numbers = itertools.count(random.Random(seed).getrandbits(32))
    for dtype, shape, trained in itertools.product(_ERRORS, _SHAPES, (False, True)):
        text = f"head ({kind}), {shape[0]} rows of {shape[1]}, {dtype}, trained {trained}"
        yield text, partial(_compare_head, device, dtype, shape, trained, next(numbers))
    for dtype, loss_type in itertools.product((torch.float32, torch.float64), _LOSSES):
        text = f"loss ({kind}), {loss_type}, {dtype}"
        yield text, partial(_compare_pairs, device, dtype, loss_type, next(numbers))


def _compare_head(
    device: str, dtype: torch.dtype, shape: tuple[int, int], trained: bool, seed: int
) -> None:
    """A head with bias, scale and softcap; one row is not scored."""
    rows, vocab = shape
    generator = torch.Generator().manual_seed(seed)
    leaves = [
        torch.randn(size, generator=generator).div(divisor).to(device, dtype)
        for size, divisor in (((rows, 24), 5**0.5), ((vocab, 24), 1.0), ((vocab,), 1.0))
    ]
    ids = torch.randint(0, vocab, (rows,), generator=generator)
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


def _compare_pairs(device: str, dtype: torch.dtype, loss_type: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logps, prior = -5 * torch.rand(2, 9, generator=generator, dtype=dtype)
    borders = torch.tensor([0, 2, 3, 7, 9], dtype=torch.int32)
    results = []
    for place, kind, impl in ((device, dtype, "auto"), ("cpu", torch.float64, "torch")):
        leaf, ends = logps.to(place, kind, copy=True).requires_grad_(), borders.to(place)
        of: dict[str, Any] = {"loss_type": loss_type, "impl": impl}
        out = pair_loss(leaf, ends, prior.to(place, kind), ends, **of)
        out.loss.sum().backward()
        results.append((out.loss, leaf.grad))
    for name, got, want in zip(("loss", "gradient"), *results, strict=True):
        _expect_close(name, got, want, dtype)


def _expect_close(name: str, got: Tensor | None, want: Tensor | None, dtype: torch.dtype) -> None:
    assert got is not None
    assert want is not None
    expect(got.isfinite().all(), f"{name}: not finite")
    size, error = (float(x.abs().max()) if x.numel() else 0.0 for x in (want, got.cpu() - want))
    allowed = _ERRORS[dtype] * (1 + size)
    expect(error <= allowed, f"{name} off by {error:.1e}, allowed {allowed:.1e}")


# ---- 22: registration -----------------------------------------------------------------------


def registration(_folder: Path, seed: int) -> Iterator[Case]:
    """Finite differences, and torch's own check of schema, tracing and gradient formula."""
    torch.manual_seed(seed)
    ids, borders = torch.tensor([0, 12, IGNORED, 5]), torch.tensor([0, 1, 4, 6, 7]).int()
    ops, check = torch.ops.rmipo_lite, torch.library.opcheck
    for mode in range(3):  # values alone, a fixed head, a trained head
        hidden, weight = torch.randn(4, 3), torch.randn(13, 3)
        leaves = hidden.requires_grad_(mode > 0), weight.requires_grad_(mode == 2)
        arguments = (*leaves, ids, torch.randn(13), _CAP, _SCALE, mode, "auto")
        yield f"linear_logps, mode {mode}", partial(check, ops.linear_logps, arguments)
    for name in _LOSSES:
        logps, prior = (-torch.rand(7)).requires_grad_(), -torch.rand(7)
        constants = (name, 2.0, 0.3, 1.6, False, 0.0, 0.5, "auto")
        arguments = (logps, borders, prior, borders, *constants)
        yield f"pair_loss {name}", partial(check, ops.pair_loss, arguments)
    pair = [torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (4, 13)]
    head = partial(linear_logps, target_ids=ids, logit_softcap=3.0)
    yield "finite differences", partial(torch.autograd.gradcheck, head, pair)


# ---- 24: the same bits ----------------------------------------------------------------------


def same_bits(folder: Path, seed: int) -> Iterator[Case]:
    """Three steps of training, twice, with one thread and with two."""
    for threads in (1, 2):
        yield f"{threads} threads", partial(_train_twice, folder, threads, seed)


def _train_twice(folder: Path, threads: int, seed: int) -> None:
    torch.set_num_threads(threads)
    runs = []
    for name in "ab":
        trainer = tiny_trainer(
            folder / f"{threads}{name}", model=tiny_model(attention_dropout=0.1),
            pairs=random_pairs(12, seed), max_steps=3, disable_dropout=False,
        )  # fmt: skip
        trainer.train()
        runs.append(trained_weights(trainer))
    torch.set_num_threads(1)
    expect(equal_weights(*runs), "two runs of one seed differ")


CHECKS = [
    Check(4, "operators against float64", partial(against_float64, "cpu")),
    Check(4, "GPU: operators against float64", partial(against_float64, "cuda"), no_gpu),
    Check(22, "operators as registered with torch", registration),
    Check(24, "same seed, same bits, with one thread and with two", same_bits),
]
