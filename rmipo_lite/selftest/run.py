"""Which checks run, and how their outcome is shown."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import signal
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

from rmipo_lite.environment import versions
from rmipo_lite.output.console import duration, say
from rmipo_lite.selftest import (
    abuse,
    addresses,
    alarms,
    autograd,
    borders,
    building,
    data,
    determinism,
    evaluation,
    extremes,
    forks,
    gpu,
    heads,
    hostile,
    lengths,
    memory,
    method,
    mistakes,
    model,
    numerics,
    soak,
    survival,
    training,
    users,
)
from rmipo_lite.selftest.scorecard import Check, Mode, Outcome, Trials, carry_out
from rmipo_lite.training.interrupt import GracefulInterrupt

_MODULES = (
    survival, soak, training, evaluation, data, borders, lengths, alarms, numerics, extremes,
    autograd, determinism, method, abuse, model, heads, building, forks, memory, users, mistakes,
    hostile, gpu, addresses,
)  # fmt: skip
# What needs things that aren't shipped; continuous integration runs them as scripts.
ELSEWHERE = {
    9: "chat templates of trl's wheel (.ci/templates.py)",
    16: "AddressSanitizer and UBSan (.ci/sanitize)",
    26: "adapters of earlier releases, merged and unmerged (.ci/adapters.py)",
    33: "oldest and newest versions of the libraries (.ci/versions)",
}
_HEAD = f"{'':>3} {'check':<58}{'trials':>7}{'survived':>10}{'lost':>6}{'seconds':>9}"


def all_checks() -> list[Check]:
    """Every check of the package, by number."""
    checks = [check for module in _MODULES for check in module.CHECKS]
    return sorted(checks, key=lambda check: check.number)


def selftest(
    mode: Mode = "default",
    *,
    seed: int = 0,
    only: Sequence[int] = (),
    trial: int | None = None,
    show: bool = True,
    debug: bool = False,
) -> list[Outcome]:
    """Run the scorecard, printing a row as each check ends.

    Args:
        mode: "quick" (under a minute), "default" (minutes) or "soak" (all trials).
        seed: what every random choice comes from.
        only: numbers of the checks to run; empty for all.
        trial: the one trial to repeat, by index.
        show: whether to print.
        debug: whether a lost trial is shown with its traceback.

    Raises:
        ValueError: a number that is no check here.
    """
    checks = _chosen(only, mode)
    outcomes = []
    if show:
        say(f"seed {seed}, {mode}; every trial depends on seed and index alone")
        say(_HEAD)
    with tempfile.TemporaryDirectory(prefix="rmipo-selftest-") as folder:
        for check in checks:
            outcome = _one(check, mode, seed, trial, Path(folder))
            outcomes.append(outcome)
            if show:
                for line in _lines(outcome, mode, seed, debug):
                    say(line)
    if show:
        for line in _closing(outcomes, only, mode):
            say(line)
    return outcomes


def _chosen(only: Sequence[int], mode: Mode) -> list[Check]:
    checks = all_checks()
    unknown = set(only) - {check.number for check in checks}
    for number in sorted(unknown):
        where = f"it is {ELSEWHERE[number]}" if number in ELSEWHERE else "there is none"
        raise ValueError(f"selftest: no check {number} here: {where}")
    if only:
        return [check for check in checks if check.number in only]
    return [check for check in checks if check.trials(mode)]


def _one(check: Check, mode: Mode, seed: int, trial: int | None, folder: Path) -> Outcome:
    absent = check.absent()
    if absent is not None:
        return Outcome(check.number, check.name, 0, [], 0.0, absent)
    indices = check.trials(mode) or check.trials("default")
    if trial is not None:
        if not 0 <= trial < check.soak:
            raise ValueError(f"selftest: check {check.number} has trials 0 to {check.soak - 1}")
        indices = [trial]
    trials = Trials(check.number, seed, mode, folder / f"check-{check.number}", indices)
    with _quiet():
        return carry_out(check, trials)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the package and its libraries print out of the table."""
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
            yield
    finally:
        logging.disable(disabled)


def _lines(outcome: Outcome, mode: Mode, seed: int, debug: bool) -> list[str]:
    head = f"{outcome.number:>3} {outcome.name:<58}"
    if outcome.absent is not None:
        return [f"{head} not run: {outcome.absent}"]
    survived = outcome.trials - outcome.lost
    lines = [f"{head}{outcome.trials:>7}{survived:>10}{outcome.lost:>6}{outcome.seconds:>9.1f}"]
    option = "" if mode == "default" else f" --{mode}"
    for loss in outcome.losses[:5]:
        tried = f" ({loss.tried})" if loss.tried else ""
        repeat = f"rmipo-lite selftest{option} --seed {seed} --only {outcome.number}"
        lines.append(f"      lost trial {loss.trial}{tried}: {loss.message}")
        lines.append(f"      repeat: {repeat} --trial {loss.trial} --debug")
        lines += [f"      {line}" for line in loss.where.splitlines()] if debug else []
    if outcome.lost > 5:
        lines.append(f"      and {outcome.lost - 5} more")
    return lines


def total_line(outcomes: Sequence[Outcome]) -> str:
    """The one line that sums it up."""
    ran = [outcome for outcome in outcomes if outcome.absent is None]
    trials, lost = sum(o.trials for o in ran), sum(o.lost for o in ran)
    return f"{len({outcome.number for outcome in ran})} checks, {trials:,} trials, {lost} lost"


def _closing(outcomes: Sequence[Outcome], only: Sequence[int], mode: Mode) -> list[str]:
    lines = []
    if not only:
        left_out = [str(c.number) for c in all_checks() if not c.trials(mode)]
        if left_out:
            lines.append(f"left out by --{mode}: {', '.join(left_out)}")
        lines += [f"not part of it: {number} {text}" for number, text in ELSEWHERE.items()]
    took = duration(sum(outcome.seconds for outcome in outcomes))
    return [*lines, f"{total_line(outcomes)}  ({took})"]


def as_json(outcomes: Sequence[Outcome], mode: Mode, seed: int) -> str:
    """The outcome with its seed and the versions it was had on, as JSON."""
    content: dict[str, Any] = {
        "total": total_line(outcomes),
        "mode": mode,
        "seed": seed,
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions(),
        "checks": [{**asdict(outcome), "lost": outcome.lost} for outcome in outcomes],
    }
    return json.dumps(content, indent=1)
