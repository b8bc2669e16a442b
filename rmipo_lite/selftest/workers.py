"""Workers forked after a forward pass: they must not wait for threads that only the parent has.

Nothing but the operators is imported here, so that a new process is soon at work.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rmipo_lite.ops import linear_logps
from rmipo_lite.selftest.check import Case, Check, expect
from rmipo_lite.selftest.processes import HANG_S, run_fresh

_ROWS, _WIDTH, _VOCAB = 600, 64, 3000  # enough for torch and the kernels to use several threads


def forked_workers(_folder: Path, _seed: int) -> Iterator[Case]:
    """A forward in the parent, then the same in workers of each kind."""
    for kind in ("dataloader", "fork"):
        yield kind, partial(expect_no_hang, parent_with_workers, kind)


def expect_no_hang(parent: Any, *args: str, seconds: float = HANG_S) -> None:
    """Lose the case when a parent's workers hang, or give other values than the parent."""
    env = {"OMP_NUM_THREADS": "2", "PYTHONWARNINGS": "ignore"}
    code, text = run_fresh(parent, *args, env=env, seconds=seconds)
    expect(code == 0, f"exit {code}: {text[-300:]}")
    expect(text.splitlines()[-1:] == ["same"], f"the workers' values differ: {text[-300:]}")


def parent_with_workers(kind: str) -> None:
    """In the parent: a forward with two threads, then workers that do it again."""
    torch.set_num_threads(2)
    want = value(0)
    torch.randn(700, 700).matmul(torch.randn(700, 700))  # and BLAS's own threads
    got = {"dataloader": by_dataloader, "fork": by_fork}[kind]()
    same = all(abs(number - want) < 1e-3 * abs(want) for number in got) and bool(got)
    print("same" if same else "different")  # noqa: T201 - what the check reads


def value(_item: object, impl: Any = "auto") -> float:
    """The operator's sum on fixed inputs, large enough for torch and the kernels to use threads."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=generator) for n in (600, 3000))
    return float(linear_logps(hidden, weight, torch.zeros(600, dtype=torch.int64), impl=impl).sum())


class _Items(torch.utils.data.Dataset[Tensor]):
    """Items that a worker computes."""

    def __init__(self, impl: str) -> None:
        self.impl = impl

    def __len__(self) -> int:
        return 4

    def __getitem__(self, place: int) -> Tensor:
        return torch.tensor(value(place, self.impl))


def by_dataloader(impl: str = "auto") -> list[float]:
    """The values of a DataLoader's workers."""
    loader = torch.utils.data.DataLoader(
        _Items(impl), num_workers=2, multiprocessing_context="fork"
    )
    return [float(item) for item in loader]


def by_fork(impl: str = "auto") -> list[float]:
    """Two bare forks: no library in between that would set the number of threads."""
    got = []
    for _ in range(2):
        ours, theirs = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.write(theirs, str(value(0, impl)).encode())
            finally:  # whatever comes, the parent's code is not the child's to run
                os._exit(0)
        os.close(theirs)
        os.waitpid(pid, 0)
        got.append(float(os.read(ours, 100) or "nan"))
        os.close(ours)
    return got


CHECKS = [Check(19, "workers forked after a forward pass", forked_workers)]
