"""Starting processes that share a run, and comparing what came of it with one process's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from tests.conftest import ROOT

_GUARD_S = 600  # of all scenarios together
_TIMES = ("_runtime", "_per_second", "_memory")
_RUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node")
Outcome = dict[str, Any]


def launched(processes: int, folder: Path, what: list[str]) -> None:
    """Run scenarios by name, or a file of options, on so many processes.

    Raises:
        AssertionError: a process failed.
        subprocess.TimeoutExpired: they hang.
    """
    command = [*_RUN, str(processes), "-m", "tests.parallel.worker", str(folder), *what]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=_GUARD_S, check=False
    )
    told = [line for line in done.stderr.splitlines() if "Error: " in line]
    assert done.returncode == 0, " | ".join(told[:4]) or done.stderr[-2000:]


def outcome_of(folder: Path, rank: int = 0) -> Outcome:
    """What a process kept of a scenario."""
    found: Outcome = torch.load(folder / f"rank{rank}.pt")
    return found


def difference(
    one: Outcome, others: list[Outcome], loose: float, *, padded: bool = False
) -> str | None:
    """Where the processes' run isn't that of one process, or theirs are not the same; else None.

    `loose`: of numbers and weights. `padded`: tokens are counted with their padding, which hangs on
    the micro-steps.
    """
    first, numbers, wanted = others[0], _numbers(others[0]), _numbers(one)
    if [line.keys() for line in numbers] != [line.keys() for line in wanted]:
        return "other lines in the log"
    for line, of_one in zip(numbers, wanted, strict=True):
        for name, value in of_one.items():
            if padded and name == "num_tokens":
                continue
            if not abs(line[name] - value) <= loose * max(1.0, abs(value)):
                return f"step {of_one.get('step')}: {name} {line[name]}, {value} by one process"
    for name, weight in one["weights"].items():
        apart = (first["weights"][name] - weight).abs().max().item()
        if not apart <= loose:
            return f"weight {name} is {apart:.1e} off"
    if (first["dropped"], len(first["failed"])) != (one["dropped"], len(one["failed"])):
        return f"dropped {first['dropped']}, failed {first['failed']}"
    for other in others[1:]:
        same = all(torch.equal(other["weights"][n], w) for n, w in first["weights"].items())
        if not same or _numbers(other) != numbers:
            return "the processes have other numbers or weights"
    return None


def _numbers(outcome: Outcome) -> list[dict[str, float]]:
    return [
        {name: value for name, value in line.items() if not name.endswith(_TIMES)}
        for line in outcome["log"]
    ]
