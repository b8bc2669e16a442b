"""Which checks run, and how their outcome is shown."""

import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rmipo_lite.environment import versions
from rmipo_lite.output.console import duration, say
from rmipo_lite.selftest import gpu, kernels, models, survival
from rmipo_lite.selftest.check import Check, Outcome, carry_out


def all_checks() -> list[Check]:
    """Every check, those first during which the server for the others gets ready."""
    return [check for part in (kernels, models, survival, gpu) for check in part.CHECKS]


def selftest(
    only: Sequence[int] = (), seed: int = 0, *, show: bool = True, debug: bool = False
) -> list[Outcome]:
    """Run the checks of these numbers, or all, in a folder below the current one, as runs are.

    Prints a row as each check ends; `debug` adds the tracebacks.

    Raises:
        ValueError: a number that no check has.
    """
    checks = [check for check in all_checks() if not only or check.number in only]
    unknown = sorted(set(only) - {check.number for check in checks})
    if unknown:
        known = ", ".join(map(str, sorted({check.number for check in all_checks()})))
        raise ValueError(f"selftest: no check {unknown[0]} here; there are {known}")
    tell = say if show else lambda text: None
    outcomes = []
    place = Path.cwd() if _can_write(Path.cwd()) else None
    with tempfile.TemporaryDirectory(
        prefix=".rmipo-selftest-", dir=place, ignore_cleanup_errors=True
    ) as folder:
        tell(f"seed {seed}; its checkpoints are on the disk of {Path(folder).parent}")
        tell(f"{'':>3} {'check':<60}{'trials':>7}{'lost':>6}{'seconds':>9}")
        for row, check in enumerate(checks):
            outcomes.append(carry_out(check, Path(folder) / str(row), seed))
            for line in _lines(outcomes[-1], seed, debug):
                tell(line)
    tell(f"{total_line(outcomes)}  ({duration(sum(outcome.seconds for outcome in outcomes))})")
    return outcomes


def _can_write(folder: Path) -> bool:
    """By trying: on Windows os.access knows the read-only mark alone."""
    probe = folder / f".rmipo-selftest-{os.getpid()}"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError:
        return False
    return True


def _lines(outcome: Outcome, seed: int, debug: bool) -> list[str]:
    head = f"{outcome.number:>3} {outcome.name:<60}"
    if outcome.absent is not None:
        return [f"{head} not run: {outcome.absent}"]
    lines = [f"{head}{outcome.trials:>7}{len(outcome.losses):>6}{outcome.seconds:>9.1f}"]
    for tried, text, where in outcome.losses:
        lines.append(f"      lost ({tried}): {text}")
        lines += [f"      {line}" for line in where.splitlines()] if debug else []
    if outcome.losses and not debug:
        command = f"rmipo-lite selftest --seed {seed} --only {outcome.number} --debug"
        lines.append(f"      repeat: {command}")
    return lines


def total_line(outcomes: Sequence[Any]) -> str:
    """The one line that sums it up; of the trials too."""
    ran = [outcome for outcome in outcomes if outcome.absent is None]
    trials, lost = sum(o.trials for o in ran), sum(len(o.losses) for o in ran)
    return f"{len({outcome.number for outcome in ran})} checks, {trials:,} trials, {lost} lost"


def as_json(outcomes: Sequence[Any], **how: object) -> str:
    """The outcome, how it was had (the seed), and on which versions, as JSON."""
    content = {
        "total": total_line(outcomes),
        **how,
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions(),
        "checks": [{**asdict(outcome), "lost": len(outcome.losses)} for outcome in outcomes],
    }
    return json.dumps(content, indent=1)
