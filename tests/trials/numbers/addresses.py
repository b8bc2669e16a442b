"""Addresses beyond 2^31: row times vocabulary passes it at row 14,135 of 151,936 tokens.

The functions take the device, so that all but the GPU itself can be tried without one.
"""

from __future__ import annotations

import mmap
import random

import torch
from torch import Tensor

from rmipo_lite.ops import library, native, reference
from rmipo_lite.ops.head_blocks import even_slices
from rmipo_lite.ops.reference import IGNORED, LogitTransform
from rmipo_lite.selftest.kernels import no_gpu
from tests.trials.numbers.operands import seeded
from tests.trials.scorecard import Check, Trials, expect

_NO_RESERVE = 0x4000  # MAP_NORESERVE: addresses without memory behind them until they are touched
_NEEDED_BYTES = 10 * 2**30


def no_bindings() -> str | None:
    """Why the kernels' host functions can't be called, or None."""
    try:
        import rmipo_lite._bindings  # noqa: F401
    except ImportError:
        return "the bindings were not built (no pybind11 when the package was installed)"
    return None


def no_large_gpu() -> str | None:
    """Why more than 2^31 logits don't fit on a GPU here, or None."""
    if no_gpu():
        return no_gpu()
    free, _ = torch.cuda.mem_get_info()
    return None if free > _NEEDED_BYTES else f"{_NEEDED_BYTES >> 30} GiB of GPU memory are wanted"


def _have_kernels(device: str) -> None:
    found = library.status(device)
    expect(found.available, f"no kernels: {found.reason}")


def addresses(trials: Trials) -> None:
    """Check 41: offsets up to 2^40, the cut of as many rows, and rows that far apart in memory."""
    from rmipo_lite import _bindings

    for trial in trials:
        with trial:
            rng = trial.rng
            for _ in range(2000):
                vocab = rng.choice((1, 97, 32_000, 151_936, 256_000, 2**20))
                row = rng.choice((0, 1, 2**31 // vocab, 2**31 // vocab + 1, 2**40 // vocab - 1))
                column = rng.randrange(vocab)
                trial.tried = f"row {row} of {vocab}, column {column}"
                offset = _bindings.row_offset(row, vocab, column)
                expect(offset == row * vocab + column, f"the offset is {offset}")
                far = rng.choice((2**31, 2**32, 2**40)) + rng.randrange(vocab)
                kind = _bindings.classify(far, vocab)
                expect(kind == "invalid", f"target {far} of {vocab} is {kind}")
            count, most = rng.randrange(2**40), rng.randrange(2**34, 2**36)
            trial.tried = f"{count} rows by {most}"
            parts = even_slices(count, most)
            ends = [0, *(part.stop for part in parts)]
            expect([part.start for part in parts] == ends[:-1], "the ranges don't meet")
            expect(ends[-1] == count, "the ranges don't cover the rows")
            if trial.index % 5 == 0 and library.status("cpu").available:
                stride = 2**30 + rng.randrange(1000)
                trial.tried = f"three rows {stride} logits apart"
                rows_apart(_memory(2 * stride + 1000), stride, 1000, rng)


def _memory(count: int) -> Tensor:
    """So many floats, of which only what is touched takes memory."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
    return torch.frombuffer(mmap.mmap(-1, 4 * count, flags=flags), dtype=torch.float32)


def rows_apart(flat: Tensor, stride: int, vocab: int, rng: random.Random) -> None:
    """The kernel on three rows of logits that lie `stride` apart in `flat`."""
    _have_kernels(flat.device.type)
    values = torch.randn(3, vocab, generator=seeded(rng))
    logits = flat.as_strided((3, vocab), (stride, 1))
    logits.copy_(values)
    ids = torch.tensor([rng.randrange(vocab), rng.randrange(vocab), IGNORED])
    logps = native.row_logps(logits, ids.to(flat.device), LogitTransform(), None, logits)
    want, grads, _ = reference.row_logps(values, ids, LogitTransform(), None, with_grads=True)
    assert grads is not None
    expect(torch.allclose(logps.cpu(), want, atol=1e-5), f"{logps.tolist()}, not {want.tolist()}")
    expect(torch.allclose(logits.cpu(), grads, atol=1e-6), "other derivatives")


def above_int32(trials: Trials) -> None:
    """Check 41 on a GPU: one call over more than 2^31 logits, and rows as far apart."""
    for trial in trials:
        with trial:
            stride = 2**30 + 7
            trial.tried = f"three rows {stride} logits apart"
            rows_apart(torch.empty(2 * stride + 1000, device="cuda"), stride, 1000, trial.rng)
            trial.tried = "14,200 rows of 151,936 logits"
            dense_rows("cuda", 14_200, 151_936, trial.rng)


def dense_rows(device: str, rows: int, vocab: int, rng: random.Random) -> None:
    """One call over all rows, of which the last ones are compared."""
    _have_kernels(device)
    logits = torch.zeros(rows, vocab, device=device)
    values = torch.randn(5, vocab, generator=seeded(rng))
    logits[-5:] = values.to(device)
    ids = torch.randint(0, vocab, (rows,), generator=seeded(rng))
    logps = native.row_logps(logits, ids.to(device), LogitTransform(), None, logits).cpu()
    want, grads, _ = reference.row_logps(values, ids[-5:], LogitTransform(), None, with_grads=True)
    assert grads is not None
    expect(torch.allclose(logps[-5:], want, atol=1e-5), "the last rows are wrong")
    expect(torch.allclose(logits[-5:].cpu(), grads, atol=1e-6), "their derivatives are wrong")
    even = -torch.log(torch.tensor(float(vocab)))
    expect(torch.allclose(logps[:-5], even, atol=1e-4), "an even row is wrong")


CHECKS = [
    Check(41, "addresses up to 2^40", 20, addresses, absent=no_bindings),
    Check(41, "GPU: more than 2^31 logits in one call", 1, above_int32, absent=no_large_gpu),
]
