"""What a check is: cases, each of which holds or is lost; and how one is carried out."""

import contextlib
import io
import logging
import shutil
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
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


@dataclass(frozen=True)
class Check:
    """One row: its cases in an empty folder by a seed, and why it can't be run here, or None.

    The number is that of its larger sister in `tests/trials`.
    """

    number: int
    name: str
    cases: Callable[[Path, int], Iterable[Case]]
    absent: Callable[[], str | None] = lambda: None


@dataclass
class Outcome:
    """What became of one check; of a lost case: what was tried, what came, the traceback."""

    number: int
    name: str
    absent: str | None
    trials: int = 0
    losses: list[tuple[str, str, str]] = field(default_factory=list)
    seconds: float = 0.0

    def lose(self, tried: str, error: Exception) -> None:
        """Note a lost case."""
        name = "" if isinstance(error, Lost) else f"{type(error).__name__}: "
        text = f"{name}{error}"[:_LONGEST_MESSAGE]
        self.losses.append((tried, text, "".join(traceback.format_exception(error))))


def carry_out(check: Check, folder: Path, seed: int) -> Outcome:
    """Every case of a check, whatever happens in it."""
    outcome = Outcome(check.number, check.name, check.absent())
    if outcome.absent is not None:
        return outcome
    start = time.monotonic()
    folder.mkdir()
    with in_quiet():
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
    shutil.rmtree(folder, ignore_errors=True)
    outcome.seconds = time.monotonic() - start
    return outcome


@contextlib.contextmanager
def in_quiet() -> Iterator[None]:
    """In one thread, which is enough for tiny models, and with nothing printed, warned, logged."""
    threads, disabled, sink = torch.get_num_threads(), logging.root.manager.disable, io.StringIO()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            contextlib.redirect_stdout(sink),
            contextlib.redirect_stderr(sink),
        ):
            yield
    finally:
        logging.disable(disabled)
        torch.set_num_threads(threads)
