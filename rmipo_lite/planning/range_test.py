"""How far may a run go? A range test: raise the learning rate until the model breaks, then go back.

What a rate does hangs on the model, the adapter's kind, rank and scale, and the optimizer; how far
one can go until text falls apart hangs on the same things. So a few steps are taken at rates that
grow, and after each some of the run's own responses are passed (`step.likely_words`), token by
token. A preference loss moves probability between what the model would say anyway. What it moves to
words that the model gave no chance, less than 1 in 1000, is damage: broken text begins there.

    rate: 1e-6, doubled while less than 0.3 % of the probability has moved, then 1.3 times
    broken: 4 % has gone to words without a chance; an answer of 25 tokens has one of them
    path = sum of the rates that came before the one that breaks (interpolated in logarithms)
    learning rate = path / sum of the schedule's factors over the run's steps,
                    at most half the rate that breaks; half of that where nothing holds the wording

so the run's rates add up to those that the model has borne: a run of four times the steps learns at
a quarter of the rate. A loss with some of the chosen side's likelihood in it comes back where it
has strayed; a bare one goes on, and many steps break what a short search left whole. The weights
are put back afterwards; the search costs time and leaves nothing. The idea of the test is Smith's
(arXiv 1506.01186). It is not the loss that is watched, which goes on falling while the text falls
apart, nor the responses' own likelihood: where rejected ones are the model's own mistakes they
become unlikely by right, long before anything breaks. Numbers, and what was tried first:
docs/claims.md.
"""

import math
from dataclasses import dataclass, field

FIRST_RATE = 1e-6
MOVED = 0.003  # of the probability: from here on the rate grows slowly
BROKEN = 0.04  # of the probability, on words without a chance
_GROWTH_FAST, _GROWTH_SLOW = 2.0, 1.3
_LARGEST_SHARE = 0.5  # of the rate that breaks
_UNHELD_SHARE = 0.5  # of the rate found, for a loss without the chosen side's likelihood
_MOST_STEPS = 60


@dataclass
class RangeTest:
    """Rates out, shares of the probability in; knows nothing of models.

    Attributes:
        rate: of the next step; at the end the one that breaks, or the last that gave numbers.
        taken: steps taken.
        path: sum of the rates so far; at the end without the one that breaks.
        strayed: share of the probability on words that had no chance at the start.
        history: (rate, `strayed` after it), a step each.
        is_over: whether the search is.
        is_broken: whether the text broke. A model without anything to lose, whose weights are
            random, has none; then rate and path are those at which it began to move.
    """

    rate: float = FIRST_RATE
    taken: int = 0
    path: float = 0.0
    strayed: float = 0.0
    history: list[tuple[float, float]] = field(default_factory=list)
    is_over: bool = False
    is_broken: bool = False
    _before: tuple[float, float] = (0.0, 0.0)  # rate and path of the step before
    _moved: tuple[float, float] | None = None  # of the step after which the model had moved

    def learning_rate(self, factors: float, *, is_held: bool) -> float:
        """Of a run whose schedule's factors add up to this many whole steps.

        None at all (a single step, at which the warm-up begins) leaves the upper bound. `is_held`:
        whether the loss has some of the chosen side's likelihood in it.
        """
        largest = _LARGEST_SHARE * self.rate
        rate = min(self.path / factors, largest) if factors else largest
        return rate if is_held else _UNHELD_SHARE * rate

    def stepped(self, moved: float, strayed: float) -> None:
        """A step at `rate` was taken, after which the model has these shares.

        Raises:
            ValueError: no rate that was tried changes them, or the first one breaks it already.
        """
        self.taken += 1
        self.path += self.rate
        before, self.strayed = self.strayed, strayed
        self.history.append((self.rate, strayed))
        is_number = math.isfinite(moved) and math.isfinite(strayed)
        is_sound = is_number and strayed < BROKEN
        if not is_sound and self.taken <= 2:
            raise ValueError(
                f"learning_rate='auto': steps at {self.history[0][0]:.0e} break the model already; "
                "pass a number"
            )
        if is_sound and self._moved is None and moved >= MOVED:
            self._moved = self.rate, self.path
        if is_sound and self.taken < _MOST_STEPS:
            self._before = self.rate, self.path
            self.rate *= _GROWTH_FAST if self._moved is None else _GROWTH_SLOW
        elif is_sound or not (is_number or before >= MOVED):
            self._give_up()  # no line is near: numbers end where text that was none falls apart
        else:
            self.is_broken = self.is_over = True
            self.rate, self.path = self._crossing(before) if is_number else self._before

    def _give_up(self) -> None:
        if self._moved is None:
            raise ValueError(
                f"learning_rate='auto': no rate up to {self.rate:.1e} changes what the model says "
                "of its pairs, so none was found; pass a number"
            )
        self.rate, self.path = self._moved
        self.is_over = True

    def _crossing(self, before: float) -> tuple[float, float]:
        """Rate where the line was crossed, and path up to it: between two steps, in logarithms."""
        if before <= 0:
            return self._before
        now = self.rate, self.path
        share = math.log(BROKEN / before) / math.log(self.strayed / before)
        rate, path = (a * (b / a) ** share for a, b in zip(self._before, now, strict=True))
        return rate, path - rate

    @property
    def words(self) -> str:
        """For whoever watches: how far the search is."""
        return (
            f"finding the learning rate: {self.rate:.1e}, {100 * self.strayed:.2g} of "
            f"{100 * BROKEN:g} % on words without a chance"
        )
