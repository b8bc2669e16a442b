"""How far may a run go? A range test: raise the learning rate until the model breaks, then go back.

What a rate does hangs on the model, the adapter's kind, rank and scale, and the optimizer; how far
one can go until text falls apart hangs on the same things. So a few steps are taken at rates that
grow, and after each the run's own responses are scored, m = their mean log-prob in nats per token,
both sides alike. A preference loss moves the two sides apart; what it does to both is damage:

    rate: 1e-6, doubled while the responses have moved by less than 1 % of |m|, then 1.3 times
    broken: m lies 20 % of |m at the start| below the best m so far
    path = sum of the rates up to there (interpolated in logarithms)
    learning rate = path / sum of the schedule's factors over the run's steps,
                    at most a quarter of the rate that breaks

so the run's rates add up to those of the search: a run of four times the steps learns at a quarter
of the rate. The weights are put back afterwards; the search costs time and leaves nothing. The idea
of the test is Smith's (arXiv 1506.01186). That the responses' own likelihood is watched and not the
loss is because a preference loss goes on falling while the text falls apart. A search by distance
alone (the policy has moved 0.1 nats per token) was tried first: where answers are nearly certain it
gave ten times too much. Numbers: docs/claims.md.
"""

import math
from dataclasses import dataclass, field

FIRST_RATE = 1e-6
_MOVED = 0.01  # of |m|: from here on the rate grows slowly
_GROWTH_FAST, _GROWTH_SLOW = 2.0, 1.3
_BROKEN = 0.2  # of |m|
_LARGEST_SHARE = 0.25  # of the rate that breaks
_MOST_STEPS = 60


@dataclass
class RangeTest:
    """Rates out, log-probs in; knows nothing of models.

    Attributes:
        start: mean log-prob of every measured response before the first step, nats per token.
        rate: of the next step; at the end the one that breaks.
        taken: steps taken.
        path: sum of the rates so far.
        fall: how far the mean lies below its best, nats per token.
        history: (rate, mean of the log-probs after it), a step each.
        is_over: whether the search is.
        is_broken: whether the model broke. One without anything to lose, whose weights are random,
            doesn't; then rate and path are those at which the responses began to move.
    """

    start: list[float]
    rate: float = FIRST_RATE
    taken: int = 0
    path: float = 0.0
    fall: float = 0.0
    history: list[tuple[float, float]] = field(default_factory=list)
    is_over: bool = False
    is_broken: bool = False
    _best: float = field(init=False)
    _before: tuple[float, float] = (0.0, 0.0)  # rate and path of the step before
    _moved: tuple[float, float] | None = None  # of the step after which the responses had moved

    def __post_init__(self) -> None:
        self._best = _mean(self.start)

    @property
    def limit(self) -> float:
        """The fall at which the model counts as broken, nats per token."""
        return _BROKEN * abs(_mean(self.start))

    def learning_rate(self, factors: float) -> float:
        """Of a run whose schedule's factors add up to this many whole steps.

        None at all (a single step, at which the warm-up begins) leaves the upper bound.
        """
        largest = _LARGEST_SHARE * self.rate
        return min(self.path / factors, largest) if factors else largest

    def stepped(self, logps: list[float]) -> None:
        """A step at `rate` was taken, after which the responses have these log-probs.

        Raises:
            ValueError: no rate that was tried changes them, or the first one breaks them already.
        """
        self.taken += 1
        self.path += self.rate
        mean, fall_before = _mean(logps), self.fall
        self.history.append((self.rate, mean))
        self._best = max(self._best, mean)
        self.fall = self._best - mean
        self.is_broken = not self.fall < self.limit  # NaN is broken too
        if self.is_broken and self.taken == 1:
            raise ValueError(
                f"learning_rate='auto': one step at {self.rate:.0e} breaks the model already; pass "
                "a number"
            )
        if self.is_broken:
            self.rate, self.path = self._crossing(fall_before)
            self.is_over = True
            return
        moved = _mean([abs(now - then) for now, then in zip(logps, self.start, strict=True)])
        if self._moved is None and moved >= _MOVED * abs(_mean(self.start)):
            self._moved = self.rate, self.path
        if self.taken == _MOST_STEPS:
            self._give_up()
            return
        self._before = self.rate, self.path
        self.rate *= _GROWTH_FAST if self._moved is None else _GROWTH_SLOW

    def _give_up(self) -> None:
        if self._moved is None:
            raise ValueError(
                f"learning_rate='auto': no rate up to {self.rate:.1e} changes what the model says "
                "of its pairs, so none was found; pass a number"
            )
        self.rate, self.path = self._moved
        self.is_over = True

    def _crossing(self, fall_before: float) -> tuple[float, float]:
        """Rate and path where the fall passed its limit: between the last two, in logarithms."""
        now = self.rate, self.path
        if not (fall_before > 0 and math.isfinite(self.fall)):
            return self._before
        share = math.log(self.limit / fall_before) / math.log(self.fall / fall_before)
        rate, path = (a * (b / a) ** share for a, b in zip(self._before, now, strict=True))
        return rate, path

    @property
    def words(self) -> str:
        """For whoever watches: how far the search is."""
        return (
            f"finding the learning rate: {self.rate:.1e}, {self.fall:.2g} of {self.limit:.2g} nats"
        )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
