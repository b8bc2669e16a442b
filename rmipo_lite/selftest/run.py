"""Which checks run, and how their outcome is shown."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rmipo_lite.environment import versions
from rmipo_lite.output.console import duration, say
from rmipo_lite.selftest import gpu, kernels, models, survival, workers
from rmipo_lite.selftest.check import Check, Outcome, carry_out

_HEAD = f"{'':>3} {'check':<58}{'trials':>7}{'lost':>6}{'seconds':>9}"


def all_checks() -> list[Check]:
    """Every check, by number."""
    checks = [c for part in (survival, workers, kernels, models, gpu) for c in part.CHECKS]
    return sorted(checks, key=lambda check: check.number)


def selftest(
    only: Sequence[int] = (), seed: int = 0, *, show: bool = True, debug: bool = False
) -> list[Outcome]:
    """Try what depends on this machine, in a folder below the current one, where runs go too.

    Args:
        only: numbers of the checks to run; empty for all.
        seed: what every random choice comes from.
        show: whether to print a row as each check ends.
        debug: whether a lost case is shown with its traceback.

    Raises:
        ValueError: a number that is no check here.
    """
    checks = all_checks()
    unknown = sorted(set(only) - {check.number for check in checks})
    if unknown:
        known = ", ".join(map(str, sorted({check.number for check in checks})))
        raise ValueError(f"selftest: no check {unknown[0]} here; there are {known}")
    tell = say if show else lambda text: None
    outcomes = []
    place = Path.cwd() if os.access(".", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix=".rmipo-selftest-", dir=place) as folder:
        tell(f"seed {seed}; its checkpoints are on the disk of {Path(folder).parent}")
        tell(_HEAD)
        for row, check in enumerate(checks):
            if not only or check.number in only:
                outcomes.append(carry_out(check, Path(folder) / str(row), seed))
                for line in _lines(outcomes[-1], seed, debug):
                    tell(line)
    tell(f"{total_line(outcomes)}  ({duration(sum(outcome.seconds for outcome in outcomes))})")
    return outcomes


def _lines(outcome: Outcome, seed: int, debug: bool) -> list[str]:
    head = f"{outcome.number:>3} {outcome.name:<58}"
    if outcome.absent is not None:
        return [f"{head} not run: {outcome.absent}"]
    lines = [f"{head}{outcome.trials:>7}{len(outcome.losses):>6}{outcome.seconds:>9.1f}"]
    for loss in outcome.losses:
        lines.append(f"      lost ({loss.tried}): {loss.message}")
        lines += [f"      {line}" for line in loss.where.splitlines()] if debug else []
    if outcome.losses and not debug:
        command = f"rmipo-lite selftest --seed {seed} --only {outcome.number} --debug"
        lines.append(f"      repeat: {command}")
    return lines


def total_line(outcomes: Sequence[Outcome]) -> str:
    """The one line that sums it up."""
    ran = [outcome for outcome in outcomes if outcome.absent is None]
    trials, lost = sum(o.trials for o in ran), sum(len(o.losses) for o in ran)
    return f"{len({outcome.number for outcome in ran})} checks, {trials} trials, {lost} lost"


def as_json(outcomes: Sequence[Outcome], seed: int) -> str:
    """The outcome with its seed and the versions it was had on, as JSON."""
    content = {
        "total": total_line(outcomes),
        "seed": seed,
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions(),
        "checks": [{**asdict(outcome), "lost": len(outcome.losses)} for outcome in outcomes],
    }
    return json.dumps(content, indent=1)
