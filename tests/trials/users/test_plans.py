"""Plans: what a run takes more than was said is found."""

from __future__ import annotations

import itertools

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
    def errors(trial: Trial, *rest):
        return {"seconds": 0.0, "memory": next(memory), "disk": -0.17 * trial.index}

    # Of one trial the memory is off once: run twice more, the middle one counts.
    memory = itertools.cycle([0.2, 0.1, 0.1])
    monkeypatch.setattr(plans, "_errors", errors)
    outcome = try_check(39, 0, 1)
    assert [loss.trial for loss in outcome.losses] == [1]
    assert "disk -17%" in outcome.losses[0].message
