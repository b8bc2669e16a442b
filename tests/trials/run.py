"""Which checks run, and how their outcome is shown."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import signal
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

from tests.trials.scorecard import Check, Outcome, Trials, carry_out

from rmipo_lite.environment import versions
from rmipo_lite.output.console import duration, say
from rmipo_lite.selftest import gpu, kernels, models, survival
from rmipo_lite.training.interrupt import GracefulInterrupt

Chosen = Sequence[tuple[Check, list[int]]]  # checks, each with its trials
_HEAD = f"{'':>3} {'check':<58}{'trials':>7}{'survived':>10}{'lost':>6}{'seconds':>9}"


def all_checks() -> list[Check]:
    """Every check of this machine; the numbers are those of their larger sisters in the tests."""
    checks = [check for room in (survival, kernels, models, gpu) for check in room.CHECKS]
    return sorted(checks, key=lambda check: check.number)


def selftest(
    only: Sequence[int] = (), seed: int = 0, *, show: bool = True, debug: bool = False
) -> list[Outcome]:
    """Try what depends on this machine; prints a row as each check ends.

    Raises:
        ValueError: a number that is no check here.
    """
    chosen = [(check, check.indices(check.all)) for check in pick(all_checks(), only)]
    with scratch() as folder:
        if show:
            say(f"seed {seed}; checkpoints are written and killed in {folder.parent}")
        repeat = f"rmipo-lite selftest --seed {seed} --only {{number}} --debug"
        return run_checks(chosen, folder, seed, repeat, show=show, debug=debug)


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder that is removed in the end, on the disk that runs go to: below this folder."""
    place = Path.cwd() if os.access(".", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix=".rmipo-selftest-", dir=place) as folder:
        yield Path(folder)


def pick(checks: Sequence[Check], only: Sequence[int]) -> list[Check]:
    """The checks of these numbers, all of them where none is given.

    Raises:
        ValueError: a number that no check has.
    """
    unknown = sorted(set(only) - {check.number for check in checks})
    if unknown:
        known = ", ".join(map(str, sorted({check.number for check in checks})))
        raise ValueError(f"there is no check {unknown[0]} here; there are {known}")
    return [check for check in checks if not only or check.number in only]


def run_checks(
    chosen: Chosen,
    folder: Path,
    seed: int,
    repeat: str,
    *,
    show: bool = True,
    debug: bool = False,
    thorough: bool = False,
) -> list[Outcome]:
    """Run checks, printing a row as each ends, and the sum.

    Args:
        chosen: the checks with their trials.
        folder: where they work.
        seed: what every random choice comes from.
        repeat: the command that repeats a lost trial, with places for {number} and {trial}.
        show: whether to print.
        debug: whether a lost trial is shown with its traceback.
        thorough: see `Trials`.
    """
    outcomes = []
    tell = say if show else lambda text: None
    tell(_HEAD)
    for check, indices in chosen:
        place = folder / f"check-{check.number}"
        outcome = run_one(check, Trials(check.number, seed, place, indices, thorough))
        outcomes.append(outcome)
        for line in _lines(outcome, repeat, debug):
            tell(line)
    took = duration(sum(outcome.seconds for outcome in outcomes))
    tell(f"{total_line(outcomes)}  ({took})")
    return outcomes


def run_one(check: Check, trials: Trials) -> Outcome:
    """One check, unless something is in its way; nothing of what it prints is seen."""
    absent = check.absent()
    if absent is not None:
        return Outcome(check.number, check.name, 0, [], 0.0, absent)
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    sink = io.StringIO()
    try:
        with (
            warnings.catch_warnings(),
            # Ctrl-C is meant for the scorecard here, not for the run that it tries.
            mock.patch.object(GracefulInterrupt, "_on_signal", signal.default_int_handler),
            contextlib.redirect_stdout(sink),
            contextlib.redirect_stderr(sink),
        ):
            warnings.simplefilter("ignore")
            return carry_out(check, trials)
    finally:
        logging.disable(disabled)


def _lines(outcome: Outcome, repeat: str, debug: bool) -> list[str]:
    head = f"{outcome.number:>3} {outcome.name:<58}"
    if outcome.absent is not None:
        return [f"{head} not run: {outcome.absent}"]
    survived = outcome.trials - outcome.lost
    lines = [f"{head}{outcome.trials:>7}{survived:>10}{outcome.lost:>6}{outcome.seconds:>9.1f}"]
    for loss in outcome.losses[:5]:
        tried = f" ({loss.tried})" if loss.tried else ""
        lines.append(f"      lost trial {loss.trial}{tried}: {loss.message}")
        command = repeat.format(number=outcome.number, trial=loss.trial)
        lines.append(f"      repeat: {command}")
        lines += [f"      {line}" for line in loss.where.splitlines()] if debug else []
    if outcome.lost > 5:
        lines.append(f"      and {outcome.lost - 5} more")
    return lines


def total_line(outcomes: Sequence[Outcome]) -> str:
    """The one line that sums it up."""
    ran = [outcome for outcome in outcomes if outcome.absent is None]
    trials, lost = sum(o.trials for o in ran), sum(o.lost for o in ran)
    return f"{len({outcome.number for outcome in ran})} checks, {trials:,} trials, {lost} lost"


def as_json(outcomes: Sequence[Outcome], seed: int, **more: Any) -> str:
    """The outcome with its seed and the versions it was had on, as JSON."""
    content: dict[str, Any] = {
        "total": total_line(outcomes),
        **more,
        "seed": seed,
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions(),
        "checks": [{**asdict(outcome), "lost": outcome.lost} for outcome in outcomes],
    }
    return json.dumps(content, indent=1)
