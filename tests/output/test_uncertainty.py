"""How sure a number is."""

from __future__ import annotations

import math

import pytest

from rmipo_lite.output.uncertainty import (
    PairedValues,
    bootstrap,
    share_text,
    standard_error,
    wilson,
)


@pytest.mark.parametrize(("hits", "count"), [(8, 12), (0, 2), (20, 20), (137, 200), (1, 1)])
def test_wilsons_ends_are_the_shares_that_the_score_test_just_allows(hits: int, count: int) -> None:
    share = hits / count
    low, high = wilson(share, count)
    assert low <= share <= high
    for end in {low, high} - {0.0, 1.0}:
        score = abs(share - end) / math.sqrt(end * (1 - end) / count)
        assert score == pytest.approx(1.96, abs=1e-6)


def test_the_share_is_in_wilsons_interval() -> None:
    """To the last bit: a bar that is drawn from one to the other has no length below 0."""
    for count in range(1, 400):
        for hits in (0, 1, count - 1, count):
            low, high = wilson(hits / count, count)
            assert low <= hits / count <= high


def test_wilson_of_nothing() -> None:
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        wilson(0.5, 0)


def test_a_share_with_its_interval() -> None:
    assert share_text(8 / 12, 12) == "67% (39 to 86%)"


def test_the_standard_error_of_a_mean() -> None:
    assert standard_error([1.0, 2.0, 3.0]) == pytest.approx(1 / math.sqrt(3))
    assert math.isnan(standard_error([1.0]))


def test_bootstrap_is_the_normal_interval_where_there_are_many() -> None:
    values = [float(i % 3 > 0) for i in range(300)]
    low, high = bootstrap(values)
    half = 1.96 * standard_error(values)
    assert (low, high) == pytest.approx((2 / 3 - half, 2 / 3 + half), abs=0.01)
    assert bootstrap(values) == (low, high)  # the same draws every time
    with pytest.raises(ValueError, match="there is none"):
        bootstrap([])


def test_a_change_is_known_case_by_case() -> None:
    """Before: 0, 10, 20; after: each one more or less a little. Means apart would be unsure."""
    values = PairedValues()
    values.note([1, 2, 3], {"loss": [0.0, 10.0, 20.0]})
    assert values.errors["loss"] == pytest.approx(10 / math.sqrt(3))
    values.begin()
    values.note([3, 1, 2, 9], {"loss": [21.0, 1.0, 11.5, math.nan]})  # another order, and a new one
    assert values.errors["loss"] == pytest.approx(standard_error([1.0, 1.0, 1.5]))
    assert values.counts["loss"] == 3
    values.note([1, 2, 3], {"loss": [0.0, 10.0, 20.0]})  # still against the run's beginning
    assert values.errors["loss"] == 0


def test_a_second_run_is_measured_from_its_own_beginning() -> None:
    values = PairedValues()
    values.note([1, 2], {"loss": [0.0, 0.0]})
    values.begin()
    values.note([1, 2], {"loss": [1.0, 3.0]})
    values.begin()
    values.note([1, 2], {"loss": [2.0, 4.0]})
    assert values.errors["loss"] == 0
