"""Mistakes and alarms: the checks hold, and find what is planted in the package."""

from __future__ import annotations

import pytest

from rmipo_lite.data import columns, report
from rmipo_lite.watch import symptoms
from tests.trials.users.mistakes import MISTAKES

NAMES = [mistake.what for mistake in MISTAKES]


@pytest.mark.parametrize(
    "say",
    [
        lambda *_: "dataset: columns found are wrong",  # no way out
        lambda *_: "dataset: columns found 'question' rename_columns" + " and so on" * 60,
        lambda *_: {}["rename_columns"],  # a library's own error
    ],
)
def test_a_message_that_falls_short_is_found(
    say, try_check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columns, "_wrong_columns", say)
    assert try_check(37, NAMES.index("other column names")).lost == 1


@pytest.mark.slow
def test_alarms_that_are_silent_or_false_are_found(
    try_check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(symptoms, "_REJECTED_SHARE", 1.0)
    monkeypatch.setattr(report, "LENGTH_BIAS_SHARE", 0.3)
    monkeypatch.setattr(report, "_EVEN", 0.0)
    lost = {loss.trial: loss.message for loss in try_check(38, 0, 2).losses}
    assert "no word of it" in lost[0]
    assert "a false alarm" in lost[2]
