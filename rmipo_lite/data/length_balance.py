"""Length balance: weights of the pairs under which length no longer tells chosen from rejected.

A loss of per-token means is paid for not stopping where the chosen side is longer: the end token's
log-prob enters the chosen mean with 1/n_chosen and the rejected one with 1/n_rejected. So pairs
that length alone explains count less. How well it does is one number, fitted to the lengths alone:

    x_i  = ln(chosen tokens / rejected tokens), the end token included
    a    = root of  sum_i x_i sigmoid(-a x_i) = 0, at least 0          logistic regression on x
    w_i  = 2 sigmoid(-a x_i), divided by their mean

Under these weights both sides have the same mean log length. Only "longer is preferred" is undone
(a >= 0): the other sign has been seen to do no harm. Where longer answers are rightly preferred the
weights throw part of that signal away; what is left is the effective sample.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Weights that leave less than this share of the pairs at work are noise, and aren't used.
LEAST_EFFECTIVE = 0.2
# Below this the data may well mean length, and it is said how to keep it.
STRONG_EFFECTIVE = 0.6
WEIGHED = "under length_balance='auto' the pairs are weighed, and length alone teaches nothing"
_LARGEST_SLOPE = 50.0  # beyond it a pair of 2 to 1 weighs 1e-15
_ITERATIONS = 100


@dataclass(frozen=True)
class LengthBalance:
    """What length says of the labels, and what the weights make of it.

    Attributes:
        slope: a; 0 where the chosen side isn't the longer one.
        standard_error: of a, from the curvature at a; None where the lengths say nothing.
        effective: effective sample under the weights, as a share of the pairs.
        end_plain: mean of 1/n_chosen - 1/n_rejected: what the losses pay for the end token, per
            unit of their slope. Negative: answers are pushed not to end.
        end_weighted: the same under the weights.
    """

    slope: float
    standard_error: float | None
    effective: float
    end_plain: float
    end_weighted: float

    @property
    def is_used(self) -> bool:
        """Whether there is anything to undo, a slope that does it, and enough left afterwards."""
        return 0 < self.slope < _LARGEST_SLOPE and self.effective >= LEAST_EFFECTIVE

    @property
    def is_strong(self) -> bool:
        """Whether length explains so much that it may be what was meant."""
        return self.effective < STRONG_EFFECTIVE

    def weights(self, chosen: Sequence[int], rejected: Sequence[int]) -> list[float]:
        """Weights of pairs with these token counts, with mean 1."""
        weights: list[float] = _weights(_log_ratios(chosen, rejected), self.slope).tolist()
        return weights

    def __str__(self) -> str:
        if not self.slope or self.slope >= _LARGEST_SLOPE:
            return f"{self.of_lengths}, end token {self.end_plain:+.4f}"
        return f"{self.of_lengths}, end token {self.end_plain:+.4f} -> {self.end_weighted:+.4f}"

    @property
    def of_lengths(self) -> str:
        """What can be said where the lengths are in words, and no end is counted."""
        if self.slope >= _LARGEST_SLOPE:
            return (
                "no weights level the lengths: the chosen side is always the longer one, or nearly"
            )
        if not self.slope:
            return "nothing to undo"
        error = "" if self.standard_error is None else f" +- {self.standard_error:.2f}"
        return f"slope {self.slope:.2f}{error}, effective sample {self.effective:.0%}"


def fit_length_balance(chosen: Sequence[int], rejected: Sequence[int]) -> LengthBalance | None:
    """Fit the slope to both sides' token counts (P each, at least 1); None of no pair."""
    if not len(chosen):
        return None
    x = _log_ratios(chosen, rejected)
    slope = fit_slope(x)
    weights = _weights(x, slope)
    inverse = 1 / _counts(chosen) - 1 / _counts(rejected)
    return LengthBalance(
        slope=slope,
        standard_error=_standard_error(x, slope),
        effective=effective_sample(weights.tolist()),
        end_plain=float(inverse.mean()),
        end_weighted=float((weights * inverse).mean()),
    )


def effective_sample(weights: Sequence[float]) -> float:
    """(sum w)^2 / (n sum w^2): the share of the pairs that weighted means still rest on."""
    return sum(weights) ** 2 / (len(weights) * sum(w * w for w in weights))


def fit_slope(x: Tensor) -> float:
    """The root a >= 0 of sum_i x_i sigmoid(-a x_i), at most `_LARGEST_SLOPE`; x (P,) float64.

    The sum falls with a, so bisection finds the root wherever it is; Newton's steps can leave the
    range where labels are nearly separable by length.
    """

    def score(slope: float) -> float:
        return float((x * torch.sigmoid(-slope * x)).sum())

    low, high = 0.0, _LARGEST_SLOPE
    if score(low) <= 0:
        return low
    if score(high) > 0:  # no root, or none below: the chosen side is longer in (nearly) all pairs
        return high
    for _ in range(_ITERATIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if score(middle) > 0 else (low, middle)
    return (low + high) / 2


def _counts(lengths: Sequence[int]) -> Tensor:
    return torch.tensor(list(lengths), dtype=torch.float64)


def _log_ratios(chosen: Sequence[int], rejected: Sequence[int]) -> Tensor:
    """ln(chosen tokens / rejected tokens), (P,) float64."""
    return (_counts(chosen) / _counts(rejected)).log()


def _standard_error(x: Tensor, slope: float) -> float | None:
    chance = torch.sigmoid(slope * x)
    information = float((x.square() * chance * (1 - chance)).sum())
    return 1 / math.sqrt(information) if information > 0 else None


def _weights(x: Tensor, slope: float) -> Tensor:
    weights = torch.sigmoid(-slope * x)
    return weights / weights.mean()
