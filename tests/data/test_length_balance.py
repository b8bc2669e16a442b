"""Length balance against a logistic regression by hand, its own equation, and its edges."""

from __future__ import annotations

import math
import random

import pytest
import torch

from rmipo_lite.data.length_balance import (
    LEAST_EFFECTIVE,
    LengthBalance,
    effective_sample,
    fit_length_balance,
)


def _lengths(slope: float, count: int = 4000, seed: int = 0) -> tuple[list[int], list[int]]:
    """Pairs whose longer side is chosen as a logistic law of this slope has it."""
    draw = random.Random(seed)
    chosen, rejected = [], []
    for _ in range(count):
        a, b = (round(math.exp(draw.gauss(4, 0.8))) + 1 for _ in range(2))
        a_wins = draw.random() < 1 / (1 + math.exp(-slope * math.log(a / b)))
        chosen.append(a if a_wins else b)
        rejected.append(b if a_wins else a)
    return chosen, rejected


def _fit(chosen: list[int], rejected: list[int]) -> LengthBalance:
    found = fit_length_balance(chosen, rejected)
    assert found is not None
    return found


def _newton(x: torch.Tensor) -> tuple[float, float]:
    """Logistic regression through the origin, all labels 1: (slope, its standard error)."""
    a = torch.zeros((), dtype=torch.float64)
    for _ in range(50):
        p = torch.sigmoid(a * x)
        information = (x * x * p * (1 - p)).sum()
        a = a + (x * (1 - p)).sum() / information
    return float(a), float(information.rsqrt())


@pytest.mark.parametrize("slope", [0.2, 0.6, 1.5])
def test_the_slope_is_that_of_a_logistic_regression(slope: float) -> None:
    chosen, rejected = _lengths(slope)
    found = _fit(chosen, rejected)
    x = (torch.tensor(chosen).double() / torch.tensor(rejected)).log()
    assert (found.slope, found.standard_error) == pytest.approx(_newton(x), rel=1e-9)
    assert abs(found.slope - slope) < 4 * found.standard_error


def test_under_the_weights_both_sides_are_alike_in_log_length() -> None:
    """The score equation, and what it is for: the end token is no longer paid for not coming."""
    chosen, rejected = _lengths(0.9)
    found = _fit(chosen, rejected)
    weights = found.weights(chosen, rejected)
    assert sum(weights) == pytest.approx(len(weights))
    means = [
        sum(w * math.log(n) for w, n in zip(weights, side, strict=True))
        for side in (chosen, rejected)
    ]
    assert means[0] == pytest.approx(means[1], rel=1e-12)
    assert found.end_plain < -0.005
    assert abs(found.end_weighted) < abs(found.end_plain) / 4
    assert found.effective == pytest.approx(effective_sample(weights))
    assert found.is_used
    assert not found.is_strong


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [([5, 5, 9], [5, 5, 9]), ([4, 9], [9, 4]), ([3, 4, 5], [9, 9, 4]), ([1], [1])],
)
def test_nothing_to_undo_weighs_all_alike(chosen: list[int], rejected: list[int]) -> None:
    """Equal lengths, balanced ones, and a chosen side that is the shorter one."""
    found = _fit(chosen, rejected)
    assert found.slope == 0
    assert not found.is_used
    assert found.weights(chosen, rejected) == [1.0] * len(chosen)
    assert found.effective == 1
    assert str(found).startswith("nothing to undo, end token ")


def test_labels_that_length_explains_whole_are_left_as_they_are() -> None:
    """No finite slope: what weights would leave is noise, and they aren't used."""
    longer = _fit([10, 30, 50], [5, 9, 20])  # no root
    assert not longer.is_used
    assert str(longer).startswith("no weights level the lengths")
    nearly = _fit([40] * 99 + [20], [10] * 99 + [21])  # one pair would weigh as much as the others
    assert 0 < nearly.slope < 50
    assert nearly.effective < LEAST_EFFECTIVE
    assert not nearly.is_used


def test_no_pair_has_no_balance() -> None:
    assert fit_length_balance([], []) is None
