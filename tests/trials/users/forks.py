"""Workers forked from a process whose thread pool has run: they must not wait for its threads.

Every trial is a process group of its own, killed as a whole when its time is up: a hung worker
outlives a parent that is killed alone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from typing import Any

import torch
from torch import Tensor

from rmipo_lite.ops import library, linear_logps
from tests.trials.runs.children import changed_environment, fresh_command
from tests.trials.scorecard import Check, Trials, expect

_PATIENCE_S = 600.0  # a trial takes seconds, beside other work a minute
_ROWS, _WIDTH, _VOCAB = 600, 64, 3000  # enough for torch and the kernels to use several threads
KINDS = ("dataloader", "fork", "map", "fork while the kernels load")


def forked_workers(trials: Trials) -> None:
    """Check 19: a forward in the parent, then the same in workers of each kind."""
    for trial in trials:
        with trial:
            kind = KINDS[trial.index % len(KINDS)]
            impl = "torch" if trial.index // len(KINDS) % 3 == 2 else "auto"
            trial.tried = f"{kind}, impl {impl}"
            expect_no_hang(kind, impl, _PATIENCE_S)


def expect_no_hang(kind: str, impl: str, seconds: float) -> None:
    """Run a parent with its workers; lose the trial when they hang or are wrong."""
    parent = subprocess.Popen(
        fresh_command(parent_with_workers, kind, impl),
        env=changed_environment({"OMP_NUM_THREADS": "2", "PYTHONWARNINGS": "ignore"}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        text, _ = parent.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(parent.pid, signal.SIGKILL)
        text, _ = parent.communicate()
        expect(False, f"hung for more than {seconds:g} s: {text[-300:]}")
    expect(parent.returncode == 0, f"exit {parent.returncode}: {text[-300:]}")
    expect(text.splitlines()[-1:] == ["same"], f"the workers' values differ: {text[-300:]}")


def parent_with_workers(kind: str, impl: str) -> None:
    """In the parent: a forward with two threads, then workers that do it again."""
    torch.set_num_threads(2)
    if kind == KINDS[3]:
        same = _fork_while_loading(impl)
    else:
        want = value(0, impl)
        torch.randn(700, 700).matmul(torch.randn(700, 700))  # and BLAS's own threads
        got = {"dataloader": _dataloader, "fork": _fork, "map": _map}[kind](impl)
        same = all(abs(number - want) < 1e-3 * abs(want) for number in got) and bool(got)
    print("same" if same else "different")  # noqa: T201 - what the check reads


def value(_item: object, impl: Any) -> float:
    """The operator's sum on fixed inputs; large enough to be shared among threads."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(_ROWS, _WIDTH, generator=generator)
    weight = torch.randn(_VOCAB, _WIDTH, generator=generator)
    ids = torch.zeros(_ROWS, dtype=torch.int64)
    return float(linear_logps(hidden, weight, ids, impl=impl).sum())


class _Items(torch.utils.data.Dataset[Tensor]):
    """Items that a worker computes."""

    def __init__(self, impl: str) -> None:
        self.impl = impl

    def __len__(self) -> int:
        return 4

    def __getitem__(self, place: int) -> Tensor:
        return torch.tensor(value(place, self.impl))


def _dataloader(impl: str) -> list[float]:
    loader = torch.utils.data.DataLoader(
        _Items(impl), num_workers=2, multiprocessing_context="fork"
    )
    return [float(item) for item in loader]


def _map(impl: str) -> list[float]:
    from datasets import Dataset

    rows = Dataset.from_dict({"place": list(range(4))})
    done = rows.map(lambda row: {"value": value(row["place"], impl)}, num_proc=2)
    return list(done["value"])


def _fork(impl: str) -> list[float]:
    """No library in between that would set the number of threads."""
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


def _fork_while_loading(impl: str) -> bool:
    """Another thread of the parent is loading the kernels, and holds the lock of that."""
    torch.randn(700, 700).matmul(torch.randn(700, 700))
    load = library._load
    started = threading.Event()

    def slow(device_type: str) -> library.BackendStatus:
        started.set()
        time.sleep(1.0)
        return load(device_type)

    library._load = slow
    thread = threading.Thread(target=library.status, args=("cpu",))
    thread.start()
    started.wait()
    library._load = load
    (number,) = _fork(impl)[:1]
    thread.join()
    return abs(number - value(0, impl)) < 1e-3 * abs(number)


CHECKS = [
    Check(19, "workers forked after a forward", 20, forked_workers, least=4),
]
