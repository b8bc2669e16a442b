"""What a check is: a number of trials, each of which survives or is lost.

A check is written as a loop:

    def flipped_bits(trials: Trials) -> None:
        whole = make_checkpoint(trials.folder)          # once
        for trial in trials:
            with trial:                                  # what raises in here is lost
                place = trial.rng.randrange(...)         # the same for the same seed and index
                trial.tried = f"bit {place}"             # told when the trial is lost
                expect(found(place), "the flipped bit was not found")

A trial depends on nothing but seed and index, so that one lost among ten thousand is repeated
alone. Fewer trials than a check has are spread evenly over its indices: a check that goes through
a table by index meets every part of it.
"""

from __future__ import annotations

import random
import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import torch

from rmipo_lite.selftest.check import Lost, expect

__all__ = ["Check", "Lost", "Outcome", "Trial", "Trials", "carry_out", "expect", "threads"]
_LONGEST_MESSAGE = 500  # characters of an error that are kept


@dataclass(frozen=True)
class Loss:
    """A lost trial: which, what was tried, what came."""

    trial: int
    tried: str
    message: str
    where: str  # the traceback


@dataclass
class Trial:
    """One trial, to be entered; exceptions in the block are noted and end it alone.

    Attributes:
        index: 0-based, below the number of trials that the check has.
        rng: its own random numbers.
        folder: an empty folder of its own, removed after the block.
        tried: what this trial does, in words; set it before the risky part.
    """

    index: int
    rng: random.Random
    folder: Path
    tried: str = ""
    loss: Loss | None = None

    def __enter__(self) -> Trial:
        self.folder.mkdir(parents=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        frames: TracebackType | None,
    ) -> bool:
        shutil.rmtree(self.folder, ignore_errors=True)
        if error is None or not isinstance(error, Exception):
            return False
        name = "" if isinstance(error, Lost) else f"{type(error).__name__}: "
        where = "".join(traceback.format_exception(error))
        text = f"{name}{error}"[:_LONGEST_MESSAGE]
        self.loss = Loss(self.index, self.tried, text, where)
        # The traceback holds the trial's models; the loop goes on without them.
        traceback.clear_frames(frames)
        return True


@dataclass
class Trials:
    """The trials of one check.

    Attributes:
        folder: an empty folder of the check, removed after it.
        indices: the trials to try.
        thorough: whether all were asked for, for what scales otherwise than by trials.
    """

    number: int
    seed: int
    folder: Path
    indices: list[int]
    thorough: bool = False
    done: int = 0
    losses: list[Loss] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Trial]:
        for index in self.indices:
            rng = random.Random(f"{self.seed}/{self.number}/{index}")
            trial = Trial(index, rng, self.folder / f"trial-{index}")
            yield trial
            self.done += 1
            if trial.loss is not None:
                self.losses.append(trial.loss)

    def missing(self, error: Exception) -> None:
        """Count every trial that was not reached as lost, because the check itself failed."""
        where = "".join(traceback.format_exception(error))
        text = f"the check itself failed: {type(error).__name__}: {error}"[:_LONGEST_MESSAGE]
        self.losses += [Loss(index, "", text, where) for index in self.indices[self.done :]]
        self.done = len(self.indices)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute in so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def always() -> str | None:
    """Nothing is in the way of a check."""
    return None


@dataclass(frozen=True)
class Check:
    """One line of the scorecard.

    Attributes:
        number: its number there.
        name: what is tried, in a few words.
        all: how many trials it has.
        run: the loop over the trials.
        least: the fewest that mean anything, where a tenth would be fewer.
        absent: why the check can't be run here, or None.
        is_long: whether a trial takes half a minute: of a number asked for it has half.
    """

    number: int
    name: str
    all: int
    run: Callable[[Trials], None]
    least: int = 1
    absent: Callable[[], str | None] = always
    is_long: bool = False

    def indices(self, count: int) -> list[int]:
        """So many trials, or all that there are, spread over all of them."""
        count = min(count, self.all)
        return [place * self.all // count for place in range(count)]


@dataclass(frozen=True)
class Outcome:
    """What became of one check."""

    number: int
    name: str
    trials: int
    losses: list[Loss]
    seconds: float
    absent: str | None = None

    @property
    def lost(self) -> int:
        """How many trials were lost."""
        return len(self.losses)


def carry_out(check: Check, trials: Trials) -> Outcome:
    """Run one check to its end, whatever happens in it."""
    start = time.perf_counter()
    trials.folder.mkdir(parents=True)
    try:
        check.run(trials)
    except Exception as error:
        trials.missing(error)
    finally:
        shutil.rmtree(trials.folder, ignore_errors=True)
    seconds = time.perf_counter() - start
    return Outcome(check.number, check.name, trials.done, trials.losses, seconds)
