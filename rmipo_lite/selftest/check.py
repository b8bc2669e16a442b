"""What a check is: cases, each of which holds or is lost; and how one is carried out."""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

Case = tuple[str, Callable[[], object]]  # what is tried, and a function that raises where it fails
_LONGEST_MESSAGE = 500  # characters of an error that are kept


class Lost(AssertionError):
    """What a case was to prove does not hold."""


def expect(holds: object, text: str) -> None:
    """Lose the case, with this text, unless `holds`."""
    if not holds:
        raise Lost(text)


def always() -> str | None:
    """Nothing is in the way of a check."""
    return None


@dataclass(frozen=True)
class Check:
    """One row.

    Attributes:
        number: that of its larger sister in `tests/trials`.
        name: what is tried, in a few words.
        cases: an empty folder and a seed -> the cases.
        absent: why it can't be run here, or None.
    """

    number: int
    name: str
    cases: Callable[[Path, int], Iterable[Case]]
    absent: Callable[[], str | None] = always


@dataclass(frozen=True)
class Loss:
    """A lost case: what was tried, what came, the traceback."""

    tried: str
    message: str
    where: str


@dataclass
class Outcome:
    """What became of one check."""

    number: int
    name: str
    trials: int = 0
    losses: list[Loss] = field(default_factory=list)
    seconds: float = 0.0
    absent: str | None = None

    def lose(self, tried: str, error: Exception) -> None:
        """Note a lost case."""
        name = "" if isinstance(error, Lost) else f"{type(error).__name__}: "
        where = "".join(traceback.format_exception(error))
        self.losses.append(Loss(tried, f"{name}{error}"[:_LONGEST_MESSAGE], where))


def carry_out(check: Check, folder: Path, seed: int) -> Outcome:
    """Every case of a check, whatever happens in it; nothing of what they print is seen."""
    outcome = Outcome(check.number, check.name, absent=check.absent())
    if outcome.absent is not None:
        return outcome
    start, before, disabled = (
        time.monotonic(),
        torch.get_num_threads(),
        logging.root.manager.disable,
    )
    folder.mkdir()
    torch.set_num_threads(1)  # tiny models gain nothing from more, and on a busy machine they wait
    logging.disable(logging.WARNING)
    sink = io.StringIO()
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(sink),
        contextlib.redirect_stderr(sink),
    ):
        warnings.simplefilter("ignore")
        try:
            for tried, run in check.cases(folder, seed):
                outcome.trials += 1
                try:
                    run()
                except Exception as error:
                    outcome.lose(tried, error)
        except Exception as error:
            outcome.trials += 1
            outcome.lose("making the cases", error)
    logging.disable(disabled)
    torch.set_num_threads(before)
    shutil.rmtree(folder, ignore_errors=True)
    outcome.seconds = time.monotonic() - start
    return outcome
