"""Plans: what a run takes more than was said is found."""

from __future__ import annotations

import pytest
import torch

from tests.trials.scorecard import Trial
from tests.trials.users import plans


def test_the_clock_goes_on_by_work_alone() -> None:
    x = torch.ones(4, 6, requires_grad=True)
    with plans._Work() as work:
        before = work.perf_counter()
        assert work.perf_counter() == before
        product = x @ torch.ones(6, 5)
        forward = work.perf_counter() - before
        product.sum().backward()
    assert forward >= 2 * 4 * 6 * 5 / 1e9
    assert work.perf_counter() - before > 2 * forward  # the backward pass counts too


def test_a_plan_that_is_off_is_lost(try_check, monkeypatch: pytest.MonkeyPatch) -> None:
    def planned(trial: Trial, *rest):
        exact = {"seconds": 1.0, "memory": 100.0, "disk": 100.0}
        return exact, {**exact, "disk": 100.0 + 20 * trial.index}

    monkeypatch.setattr(plans, "_planned_and_taken", planned)
    outcome = try_check(39, 0, 1)
    assert [loss.trial for loss in outcome.losses] == [1]
    assert "disk -17%" in outcome.losses[0].message
