"""The search for a learning rate as arithmetic: no model, no pairs."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from rmipo_lite.planning.range_test import BROKEN, FIRST_RATE, MOVED, RangeTest


def _on_a_quadratic(curvature: float, first: float = FIRST_RATE, seed: int = 0) -> RangeTest:
    """Gradient steps with noise on k x^2 / 2, which diverge from a rate of 2 / k on."""
    draw = random.Random(seed)
    noise = 1 / math.sqrt(curvature)  # of the gradient: the bowl's own scale in x
    x = 0.0
    test = RangeTest(rate=first)
    while not test.is_over:
        x -= test.rate * (curvature * x + curvature * noise * draw.gauss(0, 1))
        share = BROKEN * curvature * x * x / 0.8
        test.stepped(share, share)
    assert test.is_broken
    return test


@pytest.mark.parametrize("curvature", [30.0, 1e3, 1e5])
def test_the_rate_that_diverges_is_found(curvature: float) -> None:
    """On a bowl with noise the line is crossed within a factor of some of 2 / k."""
    for seed in range(5):
        assert 0.1 < _on_a_quadratic(curvature, seed=seed).rate / (2 / curvature) < 2


def test_where_the_search_begins_makes_no_difference() -> None:
    """In the mean: the noise meets each search at another rate."""
    paths = [
        statistics.geometric_mean(_on_a_quadratic(1e3, first, seed).path for seed in range(10))
        for first in (1e-8, 1e-6, 1e-5)
    ]
    assert max(paths) < 2.5 * min(paths)


def test_probability_that_moves_between_likely_words_is_no_damage() -> None:
    test = RangeTest()
    test.stepped(0.9, 0.0)
    test.stepped(0.9, BROKEN / 2)
    assert not test.is_over
    assert test.rate == pytest.approx(1.3**2 * FIRST_RATE)
    assert test.history == [(FIRST_RATE, 0.0), (1.3 * FIRST_RATE, BROKEN / 2)]
    assert "2 of 4 % on words" in test.words
    test.stepped(0.9, 2 * BROKEN)
    assert test.is_broken
    # The line lies half way between the last two, in logarithms of all.
    assert test.rate == pytest.approx(FIRST_RATE * 1.3**1.5)
    second, third = 2.3, 2.3 + 1.3**2
    assert test.path == pytest.approx(FIRST_RATE * math.sqrt(second * third) - test.rate)


def test_what_strays_for_a_moment_and_comes_back_is_not_broken() -> None:
    test = RangeTest()
    for strayed in (0.03, 0.01, 0.039):
        test.stepped(0.5, strayed)
    assert not test.is_over
    assert test.strayed == 0.039


def test_a_runs_rates_add_up_to_those_of_the_search() -> None:
    test = _on_a_quadratic(1e3)
    assert 50 * test.learning_rate(50, is_held=True) == pytest.approx(test.path)
    assert 400 * test.learning_rate(400, is_held=True) == pytest.approx(test.path)
    for few in (0.5, 0.0):  # don't go as fast as breaks it
        assert test.learning_rate(few, is_held=True) == test.rate / 2
        assert test.learning_rate(few, is_held=False) == test.rate / 4
    assert 50 * test.learning_rate(50, is_held=False) == pytest.approx(test.path / 2)


def test_while_nothing_moves_the_rate_doubles() -> None:
    test = RangeTest()
    test.stepped(0.0, 0.0)
    test.stepped(0.9 * MOVED, 0.0)
    assert test.rate == 4 * FIRST_RATE
    test.stepped(MOVED, 0.0)
    assert test.rate == pytest.approx(1.3 * 4 * FIRST_RATE)


def test_a_model_that_breaks_at_once_or_never_moves_has_no_rate() -> None:
    for before in ([], [0.01]):  # of two steps the sum before the second says nothing
        test = RangeTest()
        for strayed in before:
            test.stepped(0.5, strayed)
        with pytest.raises(ValueError, match="steps at 1e-06 break the model already"):
            test.stepped(0.5, BROKEN)
    still = RangeTest()
    for _ in range(59):
        still.stepped(0.0, 0.0)
    with pytest.raises(ValueError, match="no rate up to"):
        still.stepped(0.0, 0.0)
    unbroken = RangeTest()  # whose weights are random: the rate at which it began to move
    while not unbroken.is_over:
        unbroken.stepped(unbroken.rate / 1e-3, 0.0)
    assert not unbroken.is_broken
    assert 1e-3 * MOVED <= unbroken.rate < 2e-3 * MOVED


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_end_near_the_line_are_a_broken_model(bad: float) -> None:
    test = RangeTest()
    test.stepped(0.1, 0.001)
    test.stepped(0.2, 0.02)
    test.stepped(bad, bad)
    assert test.is_broken
    # Of the last step that was sound.
    assert (test.rate, test.path) == pytest.approx((1.3 * FIRST_RATE, 2.3 * FIRST_RATE))


def test_numbers_that_end_where_nothing_had_strayed_are_no_line() -> None:
    """A flat model's: at such a rate a run would be lost."""
    test = RangeTest()
    test.stepped(MOVED, 0.0)
    for _ in range(40):
        test.stepped(0.5, 0.0)
    test.stepped(math.nan, math.nan)
    assert test.is_over
    assert not test.is_broken
    assert test.rate == FIRST_RATE
    still = RangeTest()
    for _ in range(30):
        still.stepped(0.0, 0.0)
    with pytest.raises(ValueError, match="no rate up to"):
        still.stepped(math.nan, math.nan)
