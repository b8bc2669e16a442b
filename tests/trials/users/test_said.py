"""Terminals, secrets, plans: the checks hold, and each finds the fault it is there for."""

from __future__ import annotations

import pytest
from tests.trials.scorecard import Trial

from rmipo_lite.checkpoints import weights
from tests.trials.users import said as users


@pytest.mark.slow
def test_every_kind_of_output(try_check) -> None:
    assert [loss.message for loss in try_check(34, 0, 1, 2, 3, 4).losses] == []


def test_no_secret_gets_out(try_check) -> None:
    assert [loss.message for loss in try_check(36, 0, 1).losses] == []


def test_a_secret_in_a_file_is_lost(try_check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "redact", lambda content: content)
    assert "training_config.json" in try_check(36, 0).losses[0].message


def test_a_plan_that_is_off_is_lost(try_check, monkeypatch: pytest.MonkeyPatch) -> None:
    def planned(trial: Trial, *rest):
        exact = {"seconds": 1.0, "memory": 100.0, "disk": 100.0}
        return exact, {**exact, "disk": 100.0 + 20 * trial.index}

    monkeypatch.setattr(users, "_planned_and_taken", planned)
    outcome = try_check(39, 0, 1)
    assert [loss.trial for loss in outcome.losses] == [1]
    assert "disk -17%" in outcome.losses[0].message
