from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from rmipo_lite import metrics
from rmipo_lite.config import RMiPOConfig
from rmipo_lite.step import PairStep
from tests.tiny import random_pairs, tiny_model


def _gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _step(model: nn.Module, tmp_path: Path, max_tokens: int = 10**6, **options) -> PairStep:
    return PairStep(model, RMiPOConfig(str(tmp_path), **options), max_tokens, packing=True)


def _backward(loss: torch.Tensor) -> None:
    loss.backward()


@pytest.mark.parametrize("options", [{}, {"sft_weight": 0.5}, {"loss_type": "simpo"}])
def test_the_cut_into_micro_steps_changes_nothing(options: dict, tmp_path: Path) -> None:
    """8 pairs at once, one by one, and in ragged groups: one gradient."""
    model, pairs = tiny_model(), random_pairs(8)
    results = []
    for max_tokens in (10**6, 1, 60):
        model.zero_grad()
        outcome = _step(model, tmp_path, max_tokens, **options).train(pairs, _backward)
        results.append((len(outcome.values), outcome.loss, _gradients(model)))
    assert results[0][0] == 1
    assert results[1][0] == 8
    assert 1 < results[2][0] < 8
    for _, loss, gradients in results[1:]:
        torch.testing.assert_close(loss, results[0][1], atol=1e-5, rtol=0)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, results[0][2][name], atol=1e-5, rtol=1e-4)


def test_cached_prior_equals_live_while_the_policy_stands_still(tmp_path: Path) -> None:
    model, pairs = tiny_model(), random_pairs(6)
    live = _step(model, tmp_path).train(pairs, _backward)
    cached_step = _step(model, tmp_path, prior="cached")
    cached_step.prior_cache = cached_step.prior_means(pairs)
    cached = cached_step.train(pairs, _backward)
    torch.testing.assert_close(cached.loss, live.loss, atol=1e-5, rtol=0)
    # And the cache is used: another policy moves the live gamma only.
    with torch.no_grad():
        model.lm_head.weight.mul_(3.0)
    before = metrics.concat(cached.values).chosen_pmi
    after = metrics.concat(cached_step.train(pairs, _backward).values)
    moved_by = after.chosen_logps - metrics.concat(cached.values).chosen_logps
    defined = ~before.isnan()
    torch.testing.assert_close(
        (after.chosen_pmi - before)[defined], moved_by[defined], atol=1e-4, rtol=0
    )


def test_prior_context_bos_scores_the_first_token_too(tmp_path: Path) -> None:
    model, pairs = tiny_model(), random_pairs(2)
    step = _step(model, tmp_path, prior_context="bos")
    step.prior_bos_id = 1
    values = metrics.concat(list(step.evaluate(pairs)))
    # Pair 1 has one-token responses, which without BOS have no prior.
    assert torch.isfinite(values.chosen_pmi).all()
    bare = metrics.concat(list(_step(model, tmp_path).evaluate(pairs)))
    assert bare.chosen_pmi[1].isnan()
    assert bare.gamma[1] == pytest.approx(1.6)


def test_empty_prompt_of_bos_gives_no_gap(tmp_path: Path) -> None:
    """With BOS as the whole prompt, policy and prior pass read the same text: PMI 0."""
    pairs = [replace(pair, prompt_ids=[1]) for pair in random_pairs(3)]
    step = _step(tiny_model(), tmp_path, prior_context="bos")
    step.prior_bos_id = 1
    values = metrics.concat(list(step.evaluate(pairs)))
    assert values.chosen_pmi.abs().max() < 1e-5
    assert values.pmi_gap.abs().max() < 1e-5


def _poison(model: nn.Module, token: int) -> None:
    """A pair that contains this token has a NaN log-prob and a NaN gradient."""
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = torch.nan


def test_a_pair_that_is_not_finite_is_found_and_the_others_count(tmp_path: Path) -> None:
    model, pairs = tiny_model("llama"), random_pairs(5)
    good = [pair for i, pair in enumerate(pairs) if i != 2]
    clean = _step(model, tmp_path).train(good, _backward)
    wanted = _gradients(model)
    model.zero_grad()
    pairs[2] = replace(pairs[2], chosen_ids=[96, 5, 6])
    for i, pair in enumerate(pairs):
        if i != 2:
            pairs[i] = replace(
                pair,
                prompt_ids=[t if t != 96 else 3 for t in pair.prompt_ids],
                chosen_ids=[t if t != 96 else 3 for t in pair.chosen_ids],
                rejected_ids=[t if t != 96 else 3 for t in pair.rejected_ids],
            )
    _poison(model, 96)
    outcome = _step(model, tmp_path).train(pairs, _backward)
    assert [pair.row for pair in outcome.dropped] == [2]
    assert outcome.num_pairs == 4
    torch.testing.assert_close(outcome.loss, clean.loss, atol=1e-5, rtol=0)
    for name, gradient in _gradients(model).items():
        if "embed_tokens" not in name:
            torch.testing.assert_close(gradient, wanted[name], atol=1e-5, rtol=1e-4)


def test_nothing_finite_leaves_no_gradient(tmp_path: Path) -> None:
    """An optimizer passes over parameters without a gradient: no momentum, no decay."""
    model, pairs = tiny_model(), random_pairs(3)
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    outcome = _step(model, tmp_path).train(pairs, _backward)
    assert [pair.row for pair in outcome.dropped] == [0, 1, 2]
    assert outcome.num_pairs == 0
    assert outcome.loss == 0
    assert all(p.grad is None for p in model.parameters())


def test_evaluation_has_no_gradient_and_the_same_values(tmp_path: Path) -> None:
    model, pairs = tiny_model(), random_pairs(4)
    values = metrics.concat(list(_step(model, tmp_path).evaluate(pairs)))
    assert all(p.grad is None for p in model.parameters())
    trained = metrics.concat(_step(model, tmp_path).train(pairs, _backward).values)
    torch.testing.assert_close(values.loss, trained.loss, atol=1e-6, rtol=0)


def test_a_token_outside_the_vocabulary_is_an_error(tmp_path: Path) -> None:
    """The last token of a response is never embedded: only the head can notice."""
    pair = replace(random_pairs(1)[0], chosen_ids=[5, 97])
    with pytest.raises(ValueError, match="97"):
        _step(tiny_model(), tmp_path).train([pair], _backward)


@pytest.mark.cuda
def test_a_token_outside_the_vocabulary_is_an_error_on_cuda(tmp_path: Path) -> None:
    pair = replace(random_pairs(1)[0], chosen_ids=[5, 97])
    step = _step(tiny_model().cuda(), tmp_path)
    with pytest.raises(ValueError, match="outside the model's vocabulary"):
        step.train([pair], _backward)
    assert not step.train(random_pairs(2), _backward).dropped
