"""The CUDA kernels' own source, compiled for the CPU: values, and what sanitizers see.

A GPU does it faster and says more; this finds wrong indices, forgotten barriers and reads outside
of a row without one.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rmipo_lite.ops import head, head_rows, losses, native, reference
from tests.conftest import ROOT
from tests.ops.test_head import inputs, plain, worst
from tests.ops.test_head_rows import Card, OnACard

HERE = ROOT / "tests" / "cuda_on_cpu"
KERNELS = sorted((ROOT / "csrc" / "cuda").glob("*_kernel.cu"))
NONE, SAME, BFLOAT16, HALF = range(4)  # GradType of csrc/cuda/launch.h
GRAD_DTYPES = {BFLOAT16: torch.bfloat16, HALF: torch.float16}


def compiled(out: Path, sources: list[Path], *flags: str) -> Path:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler on this machine")
    command = [
        compiler, "-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas",
        "-pthread", *flags, f"-I{HERE}", *map(str, sources), "-x", "c++", *map(str, KERNELS),
        "-o", str(out),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, text=True)
    return out


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    out = tmp_path_factory.mktemp("kernels") / "kernels.so"
    library = ctypes.CDLL(str(compiled(out, [HERE / "kernels.cpp"], "-shared", "-fPIC")))
    number, pointer, real = ctypes.c_int64, ctypes.c_void_p, ctypes.c_double
    library.run_rows.argtypes = [
        ctypes.c_int, pointer, number, number, number, pointer, pointer, real, real, pointer,
        pointer, pointer, number, ctypes.c_int, pointer, pointer,
    ]  # fmt: skip
    library.run_pairs.argtypes = [
        ctypes.c_int, number, pointer, pointer, number, pointer, pointer, number, pointer, pointer,
        pointer,
    ]  # fmt: skip
    return library


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def row_logps(
    kernels: ctypes.CDLL,
    logits: Tensor,
    target_ids: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    row_scale: Tensor | None = None,
    grad_type: int = SAME,
    grads: Tensor | None = None,
    factors: Tensor | None = None,
    scale: float = 1.5,
) -> tuple[Tensor, Tensor, int]:
    count, vocab_size = logits.shape
    logps, flag = torch.empty(count, dtype=logits.dtype), torch.zeros(1, dtype=torch.int32)
    if grads is None:
        dtype = GRAD_DTYPES.get(grad_type, logits.dtype)
        grads = torch.full((count, vocab_size), 9.0, dtype=dtype)
    error = kernels.run_rows(
        logits.dtype == torch.float64, address(logits), count, vocab_size, logits.stride(0),
        address(target_ids), address(bias), softcap or 0.0, scale, address(row_scale),
        address(logps), None if grad_type == NONE else address(grads), grads.stride(0), grad_type,
        address(flag), address(factors),
    )  # fmt: skip
    assert error == 0
    return logps, grads, int(flag)


def draw(count: int, vocab_size: int, offset: int = 0, padding: int = 0) -> tuple[Tensor, ...]:
    """Logits whose rows begin `offset` elements after an aligned place, and targets."""
    generator = torch.Generator().manual_seed(vocab_size + offset)
    stride = vocab_size + padding
    flat = 4 * torch.randn(offset + count * stride, generator=generator)
    logits = flat[offset:].view(count, stride)[:, :vocab_size]
    return logits, torch.randint(vocab_size, (count,), generator=generator)


# Around a pack of 8 and around one turn of 512 threads times 8; rows that start anywhere.
SIZES = [1, 2, 7, 8, 9, 17, 4095, 4096, 4104, 9001]


# Heads with neither bias nor softcap have a kernel of their own.
PLAIN = [(size, offset, False, None) for size in SIZES for offset in (0, 1, 4)]
OTHERS = [
    (size, offset, *head)
    for size, offset in ((9, 1), (4096, 0), (4104, 1))
    for head in ((True, None), (False, 5.0), (True, 5.0))
]


@pytest.mark.parametrize(("vocab_size", "offset", "with_bias", "softcap"), [*PLAIN, *OTHERS])
def test_rows_against_the_reference(
    kernels: ctypes.CDLL, vocab_size: int, offset: int, with_bias: bool, softcap: float | None
) -> None:
    logits, ids = draw(3, vocab_size, offset)
    bias = torch.randn(vocab_size) if with_bias else None
    scale = torch.tensor([1.0, -2.0, 0.5])
    transform = reference.LogitTransform(None if bias is None else bias.double(), softcap, 1.5)
    want = reference.row_logps(logits.double(), ids, transform, scale.double(), with_grads=True)
    assert want[1] is not None
    for grad_type in (NONE, SAME, BFLOAT16, HALF):
        logps, grads, flag = row_logps(kernels, logits, ids, bias, softcap, scale, grad_type)
        assert flag == 0
        torch.testing.assert_close(logps.double(), want[0], atol=2e-5, rtol=1e-5)
        if grad_type == NONE:
            assert (grads == 9.0).all()
        else:
            half = {BFLOAT16: 2**-8, HALF: 2**-10}.get(grad_type, 0.0)
            torch.testing.assert_close(grads.double(), want[1], atol=1e-6, rtol=2e-5 + half)


def one_pass(
    kernels: ctypes.CDLL,
    logits: Tensor,
    ids: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Log-probs, derivative in float64, factors, flag."""
    factors = torch.full((len(logits),), 9.0)
    logps, grads, flag = row_logps(
        kernels, logits, ids, bias, softcap, None, BFLOAT16, factors=factors
    )
    return logps, grads.double() * factors[:, None], factors, flag


@pytest.mark.parametrize(
    ("vocab_size", "offset", "with_bias", "softcap"), [*PLAIN[::4], *PLAIN[1::8], *OTHERS]
)
def test_one_read_against_the_reference(
    kernels: ctypes.CDLL, vocab_size: int, offset: int, with_bias: bool, softcap: float | None
) -> None:
    """Every derivative to bfloat16's half a digit, the target's own too where it is tiny."""
    logits, ids = draw(4, vocab_size, offset)
    logits[0, ids[0]] += 30.0  # nearly certain
    bias = torch.randn(vocab_size) if with_bias else None
    transform = reference.LogitTransform(None if bias is None else bias.double(), softcap, 1.5)
    want = reference.row_logps(logits.double(), ids, transform, None, with_grads=True)
    assert want[1] is not None
    logps, derivative, factors, flag = one_pass(kernels, logits, ids, bias, softcap)
    assert flag == 0
    assert (factors <= 0).all()  # no row was read again
    torch.testing.assert_close(logps.double(), want[0], atol=2e-6, rtol=1e-5)
    digits = 1e-15 if softcap is None else 1e-6  # of 1 - p, of tanh's slope in float32
    torch.testing.assert_close(derivative, want[1], atol=digits, rtol=2**-8)


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_gradients_of_hidden_states_in_one_read(
    kernels: ctypes.CDLL, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A card's way with a bfloat16 head: two chunks, a row not scored, one that is read again."""
    hidden, weight, ids, _ = inputs(300, 4100, torch.bfloat16, 64)
    with torch.no_grad():
        hidden[5] *= 100
    leaf = hidden.detach().double().requires_grad_()
    read_again = []

    def with_the_kernel(logits: Tensor, ids: Tensor, of: Any, grads: Tensor) -> Any:
        factors = torch.empty(len(logits))
        logps, _, _ = row_logps(
            kernels, logits, ids, None, of.softcap, None, BFLOAT16, grads, factors, scale=of.scale
        )
        read_again.extend((factors == 1).tolist())
        return logps, factors

    monkeypatch.setattr(native, "row_exponentials", with_the_kernel)
    monkeypatch.setattr(
        head, "row_work", lambda *given: head_rows.row_work(*given[:5], True, given[6])
    )
    monkeypatch.setattr(head, "HeadProducts", OnACard)
    OnACard.card = Card()
    logps = head.linear_logps(hidden, weight, ids, logit_softcap=softcap, impl="torch")
    want = plain(leaf, weight.double(), ids, logit_softcap=softcap)
    upstream = torch.randn(300)
    logps.backward(upstream)
    want.backward(upstream.double())
    assert len(OnACard.last.chunks) == 2
    assert read_again[150]  # not scored
    assert read_again[5] == (softcap is None)
    rounding = 4 * torch.finfo(torch.bfloat16).eps
    for got, exact in ((logps, want), (hidden.grad, leaf.grad)):
        assert worst(got, exact) <= rounding * (1 + exact.abs().max().item())


@pytest.mark.parametrize("softcap", [None, 90.0])
def test_rows_too_far_from_their_target_are_read_again(
    kernels: ctypes.CDLL, softcap: float | None
) -> None:
    logits, ids = draw(6, 4100)
    for row, above in enumerate((20.0, 45.0, 46.5, 60.0, 1e4, 1e30)):  # times a scale of 1.5
        logits[row, (ids[row] + 5) % 4100] = logits[row, ids[row]] + above
    transform = reference.LogitTransform(None, softcap, 1.5)
    want = reference.row_logps(logits.double(), ids, transform, None, with_grads=True)
    assert want[1] is not None
    logps, derivative, factors, _ = one_pass(kernels, logits, ids, softcap=softcap)
    if softcap is None:
        assert (factors == 1).tolist() == [False, False, True, True, True, True]
    torch.testing.assert_close(logps.double(), want[0], atol=0, rtol=1e-5)
    torch.testing.assert_close(derivative, want[1], atol=1e-15, rtol=2**-8)


@pytest.mark.parametrize("padding", [0, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_derivative_may_overwrite_the_logits(
    kernels: ctypes.CDLL, dtype: torch.dtype, padding: int
) -> None:
    logits, ids = draw(3, 8209, padding=padding)
    logits = logits.to(dtype) if dtype == torch.float32 else logits.double()
    want = reference.row_logps(
        logits.double(), ids, reference.LogitTransform(scale=1.5), None, with_grads=True
    )
    logps, grads, _ = row_logps(kernels, logits, ids, grads=logits)
    assert grads.data_ptr() == logits.data_ptr()
    close = {"atol": 2e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 1e-12, "rtol": 0}
    torch.testing.assert_close(logps.double(), want[0], **close)
    torch.testing.assert_close(grads.double(), want[1], **close)


@pytest.mark.parametrize("in_one_read", [False, True])
def test_rows_that_are_not_scored_and_rows_that_are_broken(
    kernels: ctypes.CDLL, in_one_read: bool
) -> None:
    """-100, no token, NaN, +inf, all -inf, some -inf beside a number, +inf or -inf as target."""
    logits, ids = draw(9, 4100)
    ids[0], ids[1], ids[2] = -100, 4100, 2**40
    logits[3, 2000], logits[4, 17] = torch.nan, torch.inf
    logits[5] = -torch.inf
    logits[6, 1:] = -torch.inf
    ids[6] = 0
    logits[7, ids[7]], logits[8, ids[8]] = torch.inf, -torch.inf
    if in_one_read:
        logps, grads, _, flag = one_pass(kernels, logits, ids)
    else:
        logps, grads, flag = row_logps(kernels, logits.contiguous(), ids)
    assert flag == 1
    assert logps[0] == 0
    assert logps[1:6].isnan().all()
    assert logps[6] == 0
    assert logps[7].isnan()
    assert logps[8] == -torch.inf
    assert (grads[0] == 0).all()
    assert grads[1:6].isnan().all()
    assert (grads[6] == 0).all()
    want, _, _ = reference.row_logps(
        logits, ids, reference.LogitTransform(scale=1.5), None, with_grads=False
    )
    assert torch.equal(logps.isnan(), want.isnan())


def test_the_same_bits_twice(kernels: ctypes.CDLL) -> None:
    logits, ids = draw(4, 9001, offset=1)
    runs = [row_logps(kernels, logits, ids, grad_type=BFLOAT16)[:2] for _ in range(2)]
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])


@pytest.mark.parametrize("loss_type", ["rmipo", "simpo", "hinge", "simper"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pairs_against_the_reference(
    kernels: ctypes.CDLL, loss_type: str, dtype: torch.dtype
) -> None:
    lengths = torch.tensor([3, 200, 1, 129, 128, 0])
    borders = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    prior_borders = torch.cat([torch.zeros(1), (lengths - 1).clamp(min=0).cumsum(0)]).int()
    tokens = -torch.rand(int(borders[-1]), dtype=dtype)
    prior = -2 * torch.rand(int(prior_borders[-1]), dtype=dtype)
    options = losses.PairOptions(loss_type, 2.0, 0.3, 1.6, True, 0.0, 0.5)
    want = reference.pair_losses(tokens, borders, prior, prior_borders, options)
    got = [torch.empty(size, dtype=dtype) for size in (3, 3, 3, 6, 6, 6)]
    flag = torch.zeros(1, dtype=torch.int32)
    numbers = (ctypes.c_double * 7)(
        ["rmipo", "simpo", "hinge", "simper"].index(loss_type), *options[1:]
    )
    error = kernels.run_pairs(
        dtype == torch.float64, 3, address(tokens), address(borders), len(tokens), address(prior),
        address(prior_borders), len(prior), numbers,
        (ctypes.c_void_p * 6)(*(part.data_ptr() for part in got)), address(flag),
    )  # fmt: skip
    assert (error, int(flag)) == (0, 0)
    for part, wanted in zip(got, want, strict=True):
        torch.testing.assert_close(part, wanted, equal_nan=True, atol=2e-6, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_a_sanitizer_sees_no_fault(sanitizer: str, tmp_path: Path) -> None:
    """In the place of compute-sanitizer's memcheck and racecheck."""
    program = compiled(
        tmp_path / "sanitized", [HERE / "sanitized.cpp"], f"-fsanitize={sanitizer}",
        "-fno-sanitize-recover=all",
    )  # fmt: skip
    run = subprocess.run([program], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[:3000]
