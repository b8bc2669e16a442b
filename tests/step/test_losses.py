"""A reader can redo these by hand; the golden data stands in test_golden.py."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from rmipo_lite.checkpoints.sealed_folder import CheckpointError
from rmipo_lite.config import RMiPOConfig
from rmipo_lite.step.losses import cached_prior, chosen_token_nll, losses
from tests.kit import random_pairs, tiny_trainer


def _out(chosen, rejected, prior_chosen, prior_rejected, tmp_path: Path, **options):
    token_logps = torch.tensor([*chosen, *rejected])
    prior = torch.tensor([*prior_chosen, *prior_rejected])
    borders = torch.tensor([0, len(chosen), len(chosen) + len(rejected)], dtype=torch.int32)
    prior_borders = torch.tensor([0, len(prior_chosen), len(prior)], dtype=torch.int32)
    args = RMiPOConfig(str(tmp_path), **options)
    return losses(token_logps, borders, (prior, prior_borders), args)[0]


def test_equal_sides(tmp_path: Path) -> None:
    """D = 0, gap = 0: gamma 1.6, z = 2 * 0 - 1.6, loss = log(1 + e^1.6) = 1.7839."""
    out = _out([-1.0, -3.0], [-2.0], [-4.0], [-4.0], tmp_path)
    assert out.logps.tolist() == [-2.0, -2.0]
    assert out.gamma.item() == pytest.approx(1.6)
    assert out.loss.item() == pytest.approx(math.log1p(math.exp(1.6)), abs=1e-6)


def test_a_gap_of_log_two_halves_the_range(tmp_path: Path) -> None:
    """pmi_w = -1 + 2, pmi_l = -1 + 2 - ln 2: exp(-ln 2) = 1/2, gamma = 0.3 + 1.3 / 2 = 0.95."""
    out = _out([-1.0], [-1.0], [-2.0], [-2.0 + math.log(2)], tmp_path)
    assert out.pmi_gap.item() == pytest.approx(math.log(2), abs=1e-6)
    assert out.gamma.item() == pytest.approx(0.95, abs=1e-6)


@pytest.mark.parametrize(("prior_chosen", "gamma"), [(-60.0, 0.3), (60.0, 1.6)])
def test_far_gaps_reach_the_ends(prior_chosen: float, gamma: float, tmp_path: Path) -> None:
    out = _out([-1.0], [-1.0], [prior_chosen], [-1.0], tmp_path)
    assert out.gamma.item() == pytest.approx(gamma, abs=1e-6)


def test_gamma_inside_beta_is_twice_as_far_at_beta_two(tmp_path: Path) -> None:
    outside = _out([-1.0], [-1.0], [-1.0], [-1.0], tmp_path)
    inside = _out([-1.0], [-1.0], [-1.0], [-1.0], tmp_path, gamma_scaled_by_beta=True)
    assert outside.loss.item() == pytest.approx(math.log1p(math.exp(1.6)), abs=1e-6)
    assert inside.loss.item() == pytest.approx(math.log1p(math.exp(3.2)), abs=1e-6)


def test_equal_ends_make_rmipo_simpo(tmp_path: Path) -> None:
    sides = ([-1.0, -2.0], [-3.0], [-2.0], [-1.5])
    constant = _out(*sides, tmp_path, gamma_min=0.5, gamma_max=0.5)
    simpo = _out(*sides, tmp_path, loss_type="simpo", simpo_gamma=0.5)
    assert constant.loss.item() == pytest.approx(simpo.loss.item(), abs=1e-7)


def test_undefined_prior_takes_gamma_max(tmp_path: Path) -> None:
    out = _out([-1.0], [-5.0, -5.0], [], [-9.0], tmp_path)
    assert out.pmi_gap.item() == 0
    assert out.gamma.item() == pytest.approx(1.6)
    assert torch.isfinite(out.loss).all()


def test_cached_prior_equals_the_live_one(tmp_path: Path) -> None:
    """Means -4 and -3, once as tokens and once from the cache; an undefined side stays so."""
    args = RMiPOConfig(str(tmp_path))
    token_logps = torch.tensor([-1.0, -2.0, -1.0, -2.0])
    borders = torch.arange(5, dtype=torch.int32)
    live = (
        torch.tensor([-3.5, -4.5, -3.0, -2.0]),
        torch.tensor([0, 2, 3, 4, 4], dtype=torch.int32),
    )
    cache = {7: (-4.0, -3.0), 9: (-2.0, math.nan)}
    cached = cached_prior([7, 9], cache, torch.device("cpu"))
    a = losses(token_logps, borders, live, args)[0]
    b = losses(token_logps, borders, cached, args)[0]
    assert torch.equal(a.loss, b.loss)
    assert torch.equal(a.gamma, b.gamma)


@pytest.mark.parametrize(
    ("loss_type", "wanted"), [("rmipo", -4.0), ("simpo", -4.0), ("hinge", -2.0), ("simper", -2.0),
                              ("cpo", 0.1 * -4.0), ("orpo", 0.1 * -2.0), ("dpo", 0.1 * 1.5)],
)  # fmt: skip
def test_rewards_are_those_of_the_method(loss_type: str, wanted: float, tmp_path: Path) -> None:
    """Tokens of -1 and -3: mean -2, sum -4, and -5.5 under the reference."""
    token_logps = torch.tensor([-1.0, -3.0, -2.0])
    borders = torch.tensor([0, 2, 3], dtype=torch.int32)
    args = RMiPOConfig(str(tmp_path), loss_type=loss_type)
    prior = (token_logps, borders) if args.uses_prior else None
    reference = torch.tensor([-5.5, -2.0], dtype=torch.float64)
    if not args.loss.needs_reference:
        reference = None
    _, (chosen, _) = losses(token_logps, borders, prior, args, reference)
    assert chosen.item() == pytest.approx(wanted)


def test_chosen_token_nll_counts_chosen_tokens_only() -> None:
    token_logps = torch.tensor([-1.0, -2.0, -10.0, -4.0, -20.0])
    borders = torch.tensor([0, 2, 3, 4, 5], dtype=torch.int32)
    assert chosen_token_nll(token_logps, borders).item() == 7.0


def test_other_pairs_with_the_same_rows_have_priors_of_their_own(tmp_path: Path) -> None:
    """A second set of pairs under the same row numbers, on the trainer that cached the first's."""
    first, second = random_pairs(4, seed=1), random_pairs(4, seed=2)
    trainer = tiny_trainer(tmp_path / "a", pairs=first, prior="cached", learning_rate=0.0)
    trainer.train()
    trainer.train_dataset = second
    trainer.train()
    fresh = tiny_trainer(tmp_path / "b", pairs=second, prior="cached", learning_rate=0.0)
    fresh.train()
    assert trainer.pair_step.prior_cache == fresh.pair_step.prior_cache
    assert [e["loss"] for e in trainer.state.log_history if "loss" in e] == [
        e["loss"] for e in fresh.state.log_history if "loss" in e
    ]


def test_priors_are_scored_again_when_they_are_old(tmp_path: Path) -> None:
    """Two steps an epoch: with refresh:3 a pair of the first epoch is scored anew in the third."""
    trainer = tiny_trainer(
        tmp_path / "a", pairs=random_pairs(8), prior="refresh:3", max_steps=8,
        per_device_train_batch_size=4, gradient_accumulation_steps=1, learning_rate=0.05,
    )  # fmt: skip
    step, scored, known = trainer.pair_step, [], []
    means, train = step.prior_means, step.train

    def score(pairs: Any) -> Any:
        scored.append((trainer.state.global_step, sorted(pair.row for pair in pairs)))
        return means(pairs)

    def run(pairs: Any, *rest: Any) -> Any:
        known.append(max(abs(step.prior_cache[p.row][0] - means([p])[p.row][0]) for p in pairs))
        return train(pairs, *rest)

    step.prior_means, step.train = score, run
    trainer.train()
    at: dict[int, int] = {}
    for number, rows in scored:
        for row in rows:
            assert number - at.get(row, -3) >= 3
            at[row] = number
    visits = 8 * 4
    assert 8 < sum(len(rows) for _, rows in scored) < visits
    assert known[0] < 1e-6
    assert max(known) > 1e-3


def test_priors_that_are_always_new_are_the_live_ones(tmp_path: Path) -> None:
    options: dict[str, Any] = {"pairs": random_pairs(8), "max_steps": 4, "learning_rate": 0.01}
    live, again = (
        tiny_trainer(tmp_path / prior[:4], prior=prior, **options)
        for prior in ("live", "refresh:1")
    )
    live.train()
    again.train()
    tokens = [run.state.log_history[-2]["num_tokens"] for run in (live, again)]
    assert tokens[0] == tokens[1]
    for (name, ours), (_, wanted) in zip(
        again.model.named_parameters(), live.model.named_parameters(), strict=True
    ):
        torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("prior", ["cached", "refresh:9"])
def test_priors_are_those_of_their_context(
    prior: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A cached one of another context was never scored; one that is refreshed is scored anew."""
    options: dict[str, Any] = {
        "pairs": random_pairs(4),
        "prior": prior,
        "save_steps": 1,
        "save_strategy": "steps",
    }
    first = tiny_trainer(tmp_path, max_steps=1, **options)
    first.train()
    again = tiny_trainer(tmp_path, max_steps=2, prior_context="bos", **options)
    if prior == "cached":
        words = "prior_context was 'auto' there and is 'bos' here, and a cached prior is that of"
        with pytest.raises(CheckpointError, match=words):
            again.train(resume_from_checkpoint=True)
        return
    again.train(resume_from_checkpoint=True)
    assert "of other pairs or another prior_context" in capsys.readouterr().out
    assert again.pair_step.prior_cache != first.pair_step.prior_cache
