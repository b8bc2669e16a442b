"""What a number and a difference are worth, over seeds and over the same pairs and prompts."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from rmipo_lite.comparing.outcome import Cases, RunOutcome
from rmipo_lite.output.uncertainty import standard_error

_SURE = 1.96  # standard errors; 95 %
_LEAST_CASES = 8  # that a difference is read from


class Estimated(NamedTuple):
    """A mean with its standard error; NaN where there is none."""

    mean: float
    error: float

    @property
    def is_sure(self) -> bool:
        """Whether it differs from 0 by more than chance."""
        return math.isfinite(self.error) and abs(self.mean) > _SURE * self.error


def estimated(outcomes: Sequence[RunOutcome], measure: str) -> Estimated:
    """A method's mean over its seeds; NaN where no run has the measure."""
    return _over([one.cases.get(measure, {}) for one in outcomes])


def difference(
    outcomes: Sequence[RunOutcome], others: Sequence[RunOutcome], measure: str
) -> Estimated:
    """The first method's mean less the other's, paired by seed and by case.

    NaN where too few cases are shared.
    """
    other = {one.seed: one.cases.get(measure, {}) for one in others}
    columns = []
    for one in outcomes:
        theirs = other.get(one.seed, {})
        own = one.cases.get(measure, {})
        columns.append({case: v - theirs[case] for case, v in own.items() if case in theirs})
    shared = {case for column in columns for case in column}
    return _over(columns) if len(shared) >= _LEAST_CASES else Estimated(math.nan, math.nan)


def _over(columns: Sequence[Cases]) -> Estimated:
    """The mean of a column a seed, with the error of cases and of seeds beside each other.

    Either alone would take the other's luck for something: two seeds are alike by chance.
    """
    columns = [column for column in columns if column]
    if not columns:
        return Estimated(math.nan, math.nan)
    by_case: dict[str, list[float]] = defaultdict(list)
    for column in columns:
        for case, value in column.items():
            by_case[case].append(value)
    by_seed = [statistics.fmean(column.values()) for column in columns]
    errors = [standard_error([statistics.fmean(values) for values in by_case.values()])]
    if len(by_seed) > 1:
        errors.append(standard_error(by_seed))
    return Estimated(statistics.fmean(by_seed), math.hypot(*errors))
