"""The checks of training hold, and each finds the fault it is there for."""

from __future__ import annotations

import pytest
import torch

from rmipo_lite.checkpoints.trainer_mixin import SafeCheckpointing
from rmipo_lite.step import pair_values
from rmipo_lite.step.pair_step import PairStep
from rmipo_lite.training import run_log


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "indices"), [(2, (0, 3, 4)), (5, (4,)), (6, (3,)), (29, (0,)), (30, (0, 7))]
)
def test_nothing_is_lost(number: int, indices: tuple[int, ...], try_check) -> None:
    outcome = try_check(number, *indices)
    assert outcome.trials == len(indices)
    assert [loss.message for loss in outcome.losses] == []


@pytest.mark.slow
def test_a_step_that_is_not_checked_is_lost(try_check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PairStep, "_is_finite", lambda self, outcome: True)
    assert try_check(2, 0, 1, 2, 4).lost == 4


def test_a_weight_that_is_not_checked_is_lost(try_check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rmipo_lite.training.trainer.refuse_bad_weights", lambda *_: None)
    monkeypatch.setattr(SafeCheckpointing, "_refuse_to_save_bad_weights", lambda self: None)
    assert "went on with a weight" in try_check(2, 3).losses[0].message


@pytest.mark.slow
def test_random_numbers_that_do_not_come_back_are_lost(
    try_check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rmipo_lite.checkpoints.trainer_mixin.set_random_state", lambda state: None)
    assert try_check(5, 6).losses[0].message == "the weights differ"


@pytest.mark.slow
def test_micro_steps_of_equal_weight_are_lost(try_check, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over micro-steps of their means, which is wrong where they differ in size."""
    real = PairStep._forward

    def forward(self, pairs, prior_of):
        values, losses, nll, tokens = real(self, pairs, prior_of)
        return values, losses * (4 / len(pairs)), nll, tokens

    monkeypatch.setattr(PairStep, "_forward", forward)
    assert try_check(6, 1, 2, 3, 5, 6, 7).lost > 0


@pytest.mark.slow
def test_evaluation_that_draws_a_number_is_lost(try_check, monkeypatch: pytest.MonkeyPatch) -> None:
    real = PairStep.evaluate

    def evaluate(self, pairs):
        torch.rand(1)
        return real(self, pairs)

    monkeypatch.setattr(PairStep, "evaluate", evaluate)
    assert "evaluation changed the weights" in try_check(29, 0).losses[0].message


@pytest.mark.slow
def test_means_of_means_are_lost(try_check, monkeypatch: pytest.MonkeyPatch) -> None:
    real = pair_values.reduce

    def reduce(parts, args):
        each = [real([part], args) for part in parts]
        return {name: sum(numbers[name] for numbers in each) / len(each) for name in each[0]}

    monkeypatch.setattr(run_log.pair_values, "reduce", reduce)
    assert try_check(30, 3, 6, 9, 12).lost > 0
