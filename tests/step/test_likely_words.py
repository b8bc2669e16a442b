"""Shares of the probability, beside the same numbers from transformers' own logits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from rmipo_lite.config import RMiPOConfig
from rmipo_lite.step import likely_words
from rmipo_lite.step.likely_words import LEAST, LikelyWords
from rmipo_lite.step.pair_step import PairStep
from rmipo_lite.tokens.pair import TokenizedPair
from tests.kit import random_pairs, tiny_model


def _sure(scale: float = 30.0) -> nn.Module:
    """A model that gives some words a chance, and most none."""
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight *= scale
    return model


def _moved(model: nn.Module, size: float) -> None:
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter += size * torch.randn_like(parameter)


def _step(
    model: nn.Module, folder: Path, max_tokens: int = 10**6, packing: bool = True
) -> PairStep:
    return PairStep(model, RMiPOConfig(str(folder)), max_tokens, packing=packing)


@torch.no_grad()
def _distributions(model: nn.Module, pairs: list[TokenizedPair]) -> list[tuple[torch.Tensor, int]]:
    """Of every own token in float64, with the word that stands there."""
    found = []
    for pair in pairs:
        for ids, is_own in zip((pair.chosen_ids, pair.rejected_ids), pair.own_sides, strict=True):
            if is_own:
                logits = model(torch.tensor([pair.prompt_ids + ids])).logits[0, -len(ids) - 1 : -1]
                found += zip(logits.double().softmax(-1), ids, strict=True)
    return found


def _by_hand(
    before: list[tuple[torch.Tensor, int]], after: list[tuple[torch.Tensor, int]]
) -> tuple[float, float]:
    moved = strayed = 0.0
    for (then, word), (now, _) in zip(before, after, strict=True):
        likely = then >= LEAST
        likely[word] = True
        won = float((now - then)[~likely].sum())
        moved += float((now - then)[likely].abs().sum() + abs(won)) / 2
        strayed += max(0.0, won)
    return moved / len(before), strayed / len(before)


@pytest.mark.parametrize(
    ("max_tokens", "packing", "at_a_time"), [(10**6, True, 2**24), (40, True, 1), (40, False, 600)]
)
@pytest.mark.parametrize("unpaired", [False, True])
def test_shares_are_those_of_the_models_own_logits(
    max_tokens: int, packing: bool, at_a_time: int, unpaired: bool, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(likely_words, "_LOGITS", at_a_time)
    model, pairs = _sure().train(), random_pairs(6)
    if unpaired:
        pairs = [replace(pair, label=bool(number % 2)) for number, pair in enumerate(pairs)]
    before = _distributions(model, pairs)
    words = LikelyWords(_step(model, tmp_path, max_tokens, packing), pairs)
    assert model.training
    assert words.shares() == pytest.approx((0, 0), abs=1e-6)
    strayed = []
    for size in (0.03, 0.3):
        _moved(model, size)
        wanted = _by_hand(before, _distributions(model, pairs))
        assert words.shares() == pytest.approx(wanted, abs=1e-5)
        strayed.append(wanted[1])
    assert 0 < strayed[0] < strayed[1]


def test_a_word_that_stands_there_was_always_likely(tmp_path: Path) -> None:
    """People's own words, which the model hardly knew, are to be learnt."""
    model, pairs = _sure(), random_pairs(4)
    words = LikelyWords(_step(model, tmp_path), pairs)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        for pair in pairs:
            for ids in (pair.chosen_ids, pair.rejected_ids):
                logits = model(torch.tensor([pair.prompt_ids + ids])).logits[0, -len(ids) - 1 : -1]
                nn.functional.cross_entropy(logits, torch.tensor(ids)).backward()
        optimizer.step()
        optimizer.zero_grad()
    moved, strayed = words.shares()
    assert moved > 0.5
    assert strayed < moved / 8


def test_the_end_of_an_answer_is_no_broken_word(tmp_path: Path) -> None:
    """A base model has yet to learn it, and the first that it learns is to end anywhere."""
    model, pairs, end = _sure(), random_pairs(4), 2
    assert not any(end in (*pair.chosen_ids, *pair.rejected_ids) for pair in pairs)
    step = _step(model, tmp_path)
    without = LikelyWords(step, pairs)
    step.end_id = end
    words = LikelyWords(step, pairs)
    with torch.no_grad():
        states = torch.cat([step.states([pair])[0] for pair in pairs])
        model.lm_head.weight[end] += 30.0 * states.mean(0) / states.mean(0).norm() ** 2
    moved, strayed = without.shares()
    assert strayed > 0.001
    assert moved == pytest.approx(strayed, abs=1e-3)
    assert words.shares() == pytest.approx((moved, 0), abs=1e-3)


def test_pairs_that_are_no_numbers_are_told_and_passed_all_the_same(tmp_path: Path) -> None:
    """Processes share out the pairs that are passed: others at the start would be others' own."""
    model, pairs = tiny_model(), random_pairs(4)
    step = _step(model, tmp_path)
    of_responses, passed = step.of_responses, []
    step.of_responses = lambda some, read: (passed.append(list(some)), of_responses(some, read))[1]
    with torch.no_grad():
        word = max(set(pairs[1].prompt_ids) - {i for p in (pairs[0], *pairs[2:]) for i in (
            *p.prompt_ids, *p.chosen_ids, *p.rejected_ids)})  # fmt: skip
        model.get_input_embeddings().weight[word] = torch.nan
    words = LikelyWords(step, pairs)
    assert words.bad_rows == [pairs[1].row]
    assert len(words.pairs) == 3
    assert words.shares() == pytest.approx((0, 0), abs=1e-6)
    assert passed == [pairs, pairs]


def test_a_pair_without_a_scored_token_is_told(tmp_path: Path) -> None:
    """Without a prompt and packing the first token of a response has nothing before it."""
    pairs = random_pairs(2)
    pairs[0] = replace(pairs[0], prompt_ids=[], chosen_ids=[5], rejected_ids=[6])
    words = LikelyWords(_step(tiny_model(), tmp_path, packing=False), pairs)
    assert words.bad_rows == [pairs[0].row]
    assert words.shares() == pytest.approx((0, 0), abs=1e-6)
