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

import pytest
import torch
from torch import Tensor

from rmipo_lite.ops import losses, reference
from tests.conftest import ROOT

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
        pointer, pointer, number, ctypes.c_int, pointer,
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
) -> tuple[Tensor, Tensor, int]:
    count, vocab_size = logits.shape
    logps, flag = torch.empty(count, dtype=logits.dtype), torch.zeros(1, dtype=torch.int32)
    if grads is None:
        dtype = GRAD_DTYPES.get(grad_type, logits.dtype)
        grads = torch.full((count, vocab_size), 9.0, dtype=dtype)
    error = kernels.run_rows(
        logits.dtype == torch.float64, address(logits), count, vocab_size, logits.stride(0),
        address(target_ids), address(bias), softcap or 0.0, 1.5, address(row_scale),
        address(logps), None if grad_type == NONE else address(grads), grads.stride(0), grad_type,
        address(flag),
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


def test_rows_that_are_not_scored_and_rows_that_are_broken(kernels: ctypes.CDLL) -> None:
    """-100, no token, NaN, +inf, all -inf, and some -inf beside a number."""
    logits, ids = draw(7, 4100)
    ids[0], ids[1], ids[2] = -100, 4100, 2**40
    logits[3, 2000], logits[4, 17] = torch.nan, torch.inf
    logits[5] = -torch.inf
    logits[6, 1:] = -torch.inf
    ids[6] = 0
    logps, grads, flag = row_logps(kernels, logits.contiguous(), ids)
    assert flag == 1
    assert logps[0] == 0
    assert logps[1:6].isnan().all()
    assert logps[6] == 0
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
