"""How many trials of which checks run, and how their outcome is shown."""

from __future__ import annotations

import math
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

from rmipo_lite.output.console import duration, say
from rmipo_lite.selftest.check import in_quiet
from rmipo_lite.selftest.run import total_line
from rmipo_lite.training.interrupt import GracefulInterrupt
from tests.trials import checks as listed
from tests.trials.scorecard import Check, Outcome, Trials, carry_out

_HEAD = f"{'':>3} {'check':<58}{'trials':>7}{'survived':>10}{'lost':>6}{'seconds':>9}"


def amount(text: str) -> str:
    """What `--trials` may say: "tenth", "all", or a number of trials a check.

    Raises:
        ValueError: something else.
    """
    if text not in ("tenth", "all") and int(text) < 1:
        raise ValueError("wanted tenth, all or a number above 0")
    return text


def indices(check: Check, trials: str, trial: int | None = None) -> list[int]:
    """The trials of a check: so many, or one alone."""
    if trial is not None:
        return [trial] if 0 <= trial < check.all else []
    tenth = max(check.least, math.ceil(check.all / 10))
    if trials in ("tenth", "all"):
        return check.indices(tenth if trials == "tenth" else check.all)
    return check.indices(max(1, int(trials) // 2) if check.is_long else int(trials))


def scorecard(
    trials: str = "tenth",
    *,
    seed: int = 0,
    only: Sequence[int] = (),
    trial: int | None = None,
    show: bool = True,
    debug: bool = False,
) -> list[Outcome]:
    """Run the checks, printing a row as each ends.

    Args:
        trials: how many of each check: "tenth", "all", or a number.
        seed: what every random choice comes from.
        only: numbers of the checks to run; empty for all.
        trial: the one trial to repeat, by index.
        show: whether to print.
        debug: whether a lost trial is shown with its traceback.

    Raises:
        ValueError: a number that is no check here, or no trial of it.
    """
    outcomes = []
    tell = say if show else lambda text: None
    chosen = [(check, indices(check, trials, trial)) for check in _chosen(only)]
    chosen = [(check, places) for check, places in chosen if places]
    if not chosen:
        raise ValueError(f"trials: there is no trial {trial} of {only or 'any check'}")
    tell(f"seed {seed}, {trials}; every trial depends on seed and index alone")
    tell(_HEAD)
    with tempfile.TemporaryDirectory(prefix="rmipo-trials-") as folder:
        for check, places in chosen:
            outcome = one(check, places, Path(folder), seed, thorough=trials == "all")
            outcomes.append(outcome)
            for line in _lines(outcome, trials, seed, debug):
                tell(line)
    if not only:
        for number, text in listed.ELSEWHERE.items():
            tell(f"not part of it: {number} {text}")
    took = duration(sum(outcome.seconds for outcome in outcomes))
    tell(f"{total_line(outcomes)}  ({took})")
    return outcomes


def _chosen(only: Sequence[int]) -> list[Check]:
    checks = listed.all_checks()
    unknown = sorted(set(only) - {check.number for check in checks})
    if unknown:
        number = unknown[0]
        known = listed.ELSEWHERE.get(number)
        where = f"it is {known}" if known else "there is none"
        raise ValueError(f"trials: no check {number} here: {where}")
    return [check for check in checks if not only or check.number in only]


def one(
    check: Check, places: list[int], folder: Path, seed: int, *, thorough: bool = False
) -> Outcome:
    """Carry out some trials of a check, unless something is in its way; nothing is printed."""
    absent = check.absent()
    if absent is not None:
        return Outcome(check.number, check.name, 0, [], 0.0, absent)
    trials = Trials(check.number, seed, folder / f"check-{check.number}", places, thorough)
    # Ctrl-C is meant for the scorecard here, not for the run that it tries.
    deaf = mock.patch.object(GracefulInterrupt, "_on_signal", signal.default_int_handler)
    with in_quiet(), deaf:
        return carry_out(check, trials)


def _lines(outcome: Outcome, trials: str, seed: int, debug: bool) -> list[str]:
    head = f"{outcome.number:>3} {outcome.name:<58}"
    if outcome.absent is not None:
        return [f"{head} not run: {outcome.absent}"]
    survived = outcome.trials - outcome.lost
    lines = [f"{head}{outcome.trials:>7}{survived:>10}{outcome.lost:>6}{outcome.seconds:>9.1f}"]
    option = " --trials all" if trials == "all" else ""
    for loss in outcome.losses[:5]:
        tried = f" ({loss.tried})" if loss.tried else ""
        repeat = f"python -m tests.trials{option} --seed {seed} --only {outcome.number}"
        lines.append(f"      lost trial {loss.trial}{tried}: {loss.message}")
        lines.append(f"      repeat: {repeat} --trial {loss.trial} --debug")
        lines += [f"      {line}" for line in loss.where.splitlines()] if debug else []
    if outcome.lost > 5:
        lines.append(f"      and {outcome.lost - 5} more")
    return lines
