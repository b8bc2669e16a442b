"""How sure a number is: Wilson's interval of a share, the standard error of a mean or a change."""

import math
import random
from collections.abc import Hashable, Mapping, Sequence
from statistics import fmean, stdev

_Z = 1.96  # 95 %


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of `count` cases (Wilson 1927, score interval).

    Raises:
        ValueError: no case at all.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count!r}")
    shrink = 1 + _Z**2 / count
    middle = (share + _Z**2 / (2 * count)) / shrink
    half = _Z * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2)) / shrink
    # The share is in it, whatever the last bits say.
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))


def share_text(share: float, count: int) -> str:
    """A share with its interval, as "67% (39 to 86%)"."""
    low, high = wilson(share, count)
    return f"{share:.0%} ({100 * low:.0f} to {high:.0%})"


def bootstrap(values: Sequence[float], *, draws: int = 2000) -> tuple[float, float]:
    """The 95 % interval of a mean: of `draws` means of as many values drawn with replacement.

    The draws are the same every time (Efron 1979, percentiles).

    Raises:
        ValueError: no value at all.
    """
    if not values:
        raise ValueError("values: there is none")
    draw = random.Random(0)
    means = sorted(fmean(draw.choices(values, k=len(values))) for _ in range(draws))
    return means[round(0.025 * (draws - 1))], means[round(0.975 * (draws - 1))]


def standard_error(values: Sequence[float]) -> float:
    """Of the mean; NaN of fewer than two values."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


class PairedValues:
    """The cases of evaluations, so that a change since the run began is known case by case.

    The same pairs are scored before and after, so a change is the mean of their differences, and
    its standard error that of these: far smaller than what two means apart would have.

    Attributes:
        errors: by name, the standard error of the newest number: of its change since the run
            began, or of itself where nothing was evaluated before. NaN of fewer than two cases.
        counts: by name, of how many cases it is.
        first, newest: name -> case -> value, as the run began and by now.
    """

    def __init__(self) -> None:
        self.errors: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.newest: dict[str, dict[Hashable, float]] = {}
        self.first: dict[str, dict[Hashable, float]] = {}

    def begin(self) -> None:
        """A run begins: what was evaluated last is what it begins with."""
        self.first = dict(self.newest)

    def note(self, cases: Sequence[Hashable], columns: Mapping[str, Sequence[float]]) -> None:
        """Take an evaluation's values: name -> one of every case.

        A case that wasn't there before, or has no finite value, has no difference.
        """
        for name, values in columns.items():
            now = {case: v for case, v in zip(cases, values, strict=True) if math.isfinite(v)}
            self.newest[name], self.counts[name] = now, len(now)
            first = self.first.get(name)
            if first is None:
                self.errors[name] = standard_error(list(now.values()))
            else:
                shared = [value - first[case] for case, value in now.items() if case in first]
                self.errors[name] = standard_error(shared)
