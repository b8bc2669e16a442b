"""Borders, lengths, BOS and EOS: the checks hold, and find what is planted in the package."""

from __future__ import annotations

import pytest

from rmipo_lite.model import batch
from rmipo_lite.tokens import one_row
from rmipo_lite.tokens.encoder import TextEncoder


def test_space_marks_in_front_of_responses_are_found(
    try_check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TextEncoder, "responses", TextEncoder.encode)
    outcome = try_check(8, *range(1, 31, 3))  # the sentencepiece-like ones
    assert outcome.lost == outcome.trials


def test_one_more_token_of_prompt_is_found(try_check, monkeypatch: pytest.MonkeyPatch) -> None:
    real = one_row.prompt_room
    monkeypatch.setattr(one_row, "prompt_room", lambda *rest: real(*rest) + 1)
    assert try_check(10, *range(27)).lost > 5


def test_a_division_by_another_count_is_found(try_check, monkeypatch: pytest.MonkeyPatch) -> None:
    real = batch.prior_input

    def scores_the_first_token(pairs, packing, front=(), pad_id=0):
        return real(pairs, packing, [1], pad_id)

    monkeypatch.setattr(batch, "prior_input", scores_the_first_token)
    assert try_check(10, *range(27)).lost > 5


@pytest.mark.parametrize(
    ("fault", "replacement"),
    [
        ("front", lambda self, prompt: self.bos_ids),  # a template's BOS is cut away
        ("end_of_turn", lambda self, after: after + "</s>"),  # two end tokens
        ("prompts", lambda self, texts: [[1, *ids] for ids in self.encode(texts)]),  # two BOS
    ],
)
def test_wrong_counts_of_bos_and_eos_are_found(
    fault: str, replacement, try_check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TextEncoder, fault, replacement)
    assert try_check(11, *range(24)).lost > 0


def test_an_end_token_masked_as_padding_is_found(
    try_check, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = batch._targets

    def masked(sequences):
        targets = real(sequences)
        return targets.masked_fill(targets == 2, -100)

    monkeypatch.setattr(batch, "_targets", masked)
    assert try_check(11, *range(24)).lost == 12  # those that are not truncated
