"""The search for a learning rate as arithmetic: no model, no pairs."""

from __future__ import annotations

import math
import random

import pytest

from rmipo_lite.planning.range_test import FIRST_RATE, RangeTest


def _on_a_quadratic(curvature: float, first: float = FIRST_RATE, seed: int = 0) -> RangeTest:
    """Gradient steps with noise on k x^2 / 2, which diverge from a rate of 2 / k on."""
    draw = random.Random(seed)
    noise = 1 / math.sqrt(curvature)  # of the gradient: the bowl's own scale in x
    x = 0.0
    test = RangeTest([-1.0, -3.0], rate=first)
    while not test.is_over:
        x -= test.rate * (curvature * x + curvature * noise * draw.gauss(0, 1))
        test.stepped([m - curvature * x * x / 2 for m in test.start])
    assert test.is_broken
    return test


@pytest.mark.parametrize("curvature", [30.0, 1e3, 1e5])
def test_the_rate_that_diverges_is_found(curvature: float) -> None:
    """On a bowl with noise the line is crossed within a factor of some of 2 / k."""
    for seed in range(5):
        assert 0.1 < _on_a_quadratic(curvature, seed=seed).rate / (2 / curvature) < 2


def test_where_the_search_begins_makes_no_difference() -> None:
    paths = [_on_a_quadratic(1e3, first).path for first in (1e-8, 1e-6, 1e-5)]
    assert max(paths) < 3 * min(paths)  # the noise meets each at another rate


def test_a_fall_counts_from_the_best_and_a_rise_is_none() -> None:
    test = RangeTest([-2.0, -4.0])
    assert test.limit == pytest.approx(0.6)  # 20 % of 3 nats
    test.stepped([-1.0, -3.0])  # both rise: learning what an answer looks like
    assert not test.is_over
    assert test.fall == 0
    assert test.rate == pytest.approx(1.3 * FIRST_RATE)  # moved by more than 1 % of 3 nats
    test.stepped([-1.5, -3.5])
    assert test.fall == pytest.approx(0.5)
    assert test.history == [(FIRST_RATE, -2.0), (1.3 * FIRST_RATE, -2.5)]
    test.stepped([-1.8, -3.8])  # still no worse than at the start
    assert test.is_broken
    # 0.6 between falls of 0.5 and 0.8, in logarithms of all
    share = math.log(0.6 / 0.5) / math.log(0.8 / 0.5)
    assert test.rate == pytest.approx(FIRST_RATE * 1.3 ** (1 + share))
    second, third = 2.3, 2.3 + 1.3**2
    assert test.path == pytest.approx(FIRST_RATE * second * (third / second) ** share)


def test_a_runs_rates_add_up_to_those_of_the_search() -> None:
    test = _on_a_quadratic(1e3)
    assert 50 * test.learning_rate(50) == pytest.approx(test.path)
    assert 400 * test.learning_rate(400) == pytest.approx(test.path)
    for few in (0.5, 0.0):  # don't go as fast as breaks it
        assert test.learning_rate(few) == test.rate / 4


def test_while_nothing_moves_the_rate_doubles() -> None:
    test = RangeTest([-3.0])
    test.stepped([-3.0])
    test.stepped([-3.01])
    assert test.rate == 4 * FIRST_RATE


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_numbers_that_are_none_are_a_broken_model(bad: float) -> None:
    test = RangeTest([-3.0])
    test.stepped([-3.0])
    test.stepped([bad])
    assert test.is_broken
    assert (test.rate, test.path) == (FIRST_RATE, FIRST_RATE)  # of the last step that was sound
