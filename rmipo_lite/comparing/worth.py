"""What a number and a difference are worth, over seeds and over the same pairs and prompts."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from rmipo_lite.comparing.outcome import RunOutcome
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
    """A method's mean over its seeds: error over seeds, or over the cases of a single seed."""
    means = [mean for one in outcomes if not math.isnan(mean := one.mean(measure))]
    if not means:
        return Estimated(math.nan, math.nan)
    if len(means) == 1:
        cases = [v for one in outcomes for v in one.cases.get(measure, {}).values()]
        return Estimated(means[0], standard_error(cases))
    return Estimated(statistics.fmean(means), standard_error(means))


def difference(
    outcomes: Sequence[RunOutcome], others: Sequence[RunOutcome], measure: str
) -> Estimated:
    """The first method's mean less the other's, paired by seed and by case.

    Its error is that of the pairs or prompts, and with several seeds that of the seeds beside it:
    either alone would take the other's luck for a difference. NaN where too few cases are shared.
    """
    other = {one.seed: one.cases.get(measure, {}) for one in others}
    by_case, by_seed = defaultdict(list), []
    for one in outcomes:
        theirs = other.get(one.seed, {})
        own = {c: v - theirs[c] for c, v in one.cases.get(measure, {}).items() if c in theirs}
        for case, value in own.items():
            by_case[case].append(value)
        if own:
            by_seed.append(statistics.fmean(own.values()))
    if len(by_case) < _LEAST_CASES:
        return Estimated(math.nan, math.nan)
    errors = [standard_error([statistics.fmean(values) for values in by_case.values()])]
    if len(by_seed) > 1:
        errors.append(standard_error(by_seed))
    return Estimated(statistics.fmean(by_seed), math.hypot(*errors))
