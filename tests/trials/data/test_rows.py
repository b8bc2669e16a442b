"""Malformed rows and containers: the checks hold, and find what is planted in the package."""

from __future__ import annotations

import math

import pytest

from rmipo_lite.data import columns, normalise
from tests.trials.data.bad_rows import KINDS, tools


def test_every_kind_is_met_by_a_tenth_of_the_trials() -> None:
    assert math.gcd(len(KINDS) + 1, 10) == 1


def _nothing_given(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(normalise, "_is_given", lambda value: False)
    return KINDS.index(tools)


def _surrogates_pass(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(normalise, "_checked_text", lambda text, column: text)
    return 3


def _columns_unnamed(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(columns, "_nearest", lambda wanted, names: None)
    return len(KINDS)


@pytest.mark.parametrize("plant", [_nothing_given, _surrogates_pass, _columns_unnamed])
def test_a_fault_in_reading_rows_is_found(
    plant, try_check, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = plant(monkeypatch)
    size = len(KINDS) + 1
    assert try_check(3, index, index + size, index + 2 * size).lost == 3
