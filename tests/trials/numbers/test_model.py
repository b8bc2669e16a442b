"""Company, dropout, adapter gradients: the checks hold, and find what is planted."""

from __future__ import annotations

import pytest

from rmipo_lite.model import loading
from rmipo_lite.step import pair_step
from rmipo_lite.training import trainer


def test_a_pair_that_depends_on_its_company_is_found(
    try_check, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = pair_step.scored_hidden

    def scored_hidden(model, inputs):
        hidden = real(model, inputs)
        return hidden + 1e-2 * hidden.mean(0)

    monkeypatch.setattr(pair_step, "scored_hidden", scored_hidden)
    assert try_check(23, 0, 1, 2).lost == 3


def test_dropout_that_stays_on_is_found(try_check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "disable_dropout", lambda model: None)
    outcome = try_check(25, 0, 1)
    assert outcome.lost == 2
    assert "two passes differ" in outcome.losses[0].message


def test_four_bit_layers_without_protection_are_found(
    try_check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "protect_4bit_on_cpu", lambda model: None)
    assert try_check(32, 2).lost == 1


def test_an_adapter_without_a_gradient_is_found(try_check, monkeypatch: pytest.MonkeyPatch) -> None:
    real = pair_step.scored_hidden
    monkeypatch.setattr(pair_step, "scored_hidden", lambda *arguments: real(*arguments).detach())
    assert try_check(32, 0).lost == 1
