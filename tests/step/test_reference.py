"""Methods of sums in steps of a run: gradients by plain transformers, and what the reference is."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor

from rmipo_lite.config import RMiPOConfig
from rmipo_lite.methods.table import SumLoss, methods
from rmipo_lite.step.reference import key_of
from rmipo_lite.tokens.pair import TokenizedPair
from rmipo_lite.training.trainer import RMiPOTrainer
from tests.kit import random_pairs, tiny_model, word_tokenizer

_OF_SUMS = [name for name, method in methods().items() if isinstance(method, SumLoss)]
# From ratios (sums, where there is no reference) of both sides, beta and lengths.
_BY_HAND = {
    "dpo": lambda c, r, beta, n: F.softplus(-beta * (c - r)),
    "apo_zero": lambda c, r, beta, n: torch.sigmoid(-beta * c) + torch.sigmoid(beta * r),
    "kto_pair": lambda c, r, beta, n: (
        torch.sigmoid(-beta * (c - r.mean().clamp(min=0)))
        + torch.sigmoid(-beta * (c.mean().clamp(min=0) - r))
    ) / 2,
    "cpo": lambda c, r, beta, n: F.softplus(-beta * (c - r)),
    "orpo": lambda c, r, beta, n: beta * F.softplus(-(_odds(c / n[0]) - _odds(r / n[1]))),
    "ipo": lambda c, r, beta, n: (c / n[0] - r / n[1] - 1 / (2 * beta)) ** 2,
}  # fmt: skip


def _odds(mean: Tensor) -> Tensor:
    return mean - torch.log1p(-mean.exp())


def _trainer(folder: Path, model: Any, peft_config: Any = "auto", **options: Any) -> RMiPOTrainer:
    settings = {"max_steps": 2, "per_device_train_batch_size": 6, "save_strategy": "no", **options}
    ref_model, pairs = settings.pop("ref_model", None), settings.pop("pairs", random_pairs(12))
    args = RMiPOConfig(
        str(folder), disable_tqdm=True, eval_completions=0, use_cpu=True, logging_steps=1,
        **{"learning_rate": 1e-2, "loss_type": "dpo", **settings},
    )  # fmt: skip
    return RMiPOTrainer(
        model, args, train_dataset=pairs, eval_dataset=random_pairs(5, seed=9),
        processing_class=word_tokenizer(), peft_config=peft_config, ref_model=ref_model,
    )  # fmt: skip


def _sum(model: Any, pair: TokenizedPair, response: list[int]) -> Tensor:
    ids = torch.tensor([[*pair.prompt_ids, *response]])
    logps = model(ids).logits[0, :-1].double().log_softmax(-1)
    return logps.gather(1, ids[0, 1:, None])[-len(response) :].sum()


def _sides(model: Any, pairs: list[TokenizedPair]) -> tuple[Tensor, Tensor]:
    sides = [(_sum(model, p, p.chosen_ids), _sum(model, p, p.rejected_ids)) for p in pairs]
    return torch.stack([w for w, _ in sides]), torch.stack([r for _, r in sides])


def _slow_gradients(
    model: Any, reference: Any, pairs: list[TokenizedPair], args: RMiPOConfig
) -> tuple[float, dict[str, Tensor]]:
    chosen, rejected = _sides(model, pairs)
    lengths = [torch.tensor([float(len(s)) for s in side]) for side in (
        [p.chosen_ids for p in pairs], [p.rejected_ids for p in pairs])]  # fmt: skip
    likelihood = -chosen.sum() / lengths[0].sum()
    if args.loss.needs_reference:
        with torch.no_grad():
            of_chosen, of_rejected = _sides(reference, pairs)
        chosen, rejected = chosen - of_chosen, rejected - of_rejected
    loss = _BY_HAND[args.loss_type](chosen, rejected, args.beta, lengths).mean()
    model.zero_grad()
    (loss + args.sft_weight * likelihood).backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("loss_type", _BY_HAND)
@pytest.mark.parametrize("max_tokens", [4096, 40])
def test_a_step_is_the_plain_one(loss_type: str, max_tokens: int, tmp_path: Path) -> None:
    """After two steps, so that policy and reference differ; the step in one piece and in many."""
    model = tiny_model("llama").double()
    reference = copy.deepcopy(model)
    trainer = _trainer(tmp_path, model, loss_type=loss_type, max_tokens_per_microstep=max_tokens)
    trainer.train()
    pairs = random_pairs(12)[:6]
    trainer.model.zero_grad()
    outcome = trainer.pair_step.train(pairs, lambda loss: loss.backward())
    ours = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    values = torch.cat([part.loss for part in outcome.values])
    loss, slow = _slow_gradients(trainer.model, reference, pairs, trainer.args)
    assert len(outcome.values) == (1 if max_tokens == 4096 else len(outcome.values))
    assert (len(outcome.values) > 2) == (max_tokens == 40)
    assert values.mean().item() == pytest.approx(loss, rel=1e-9)
    assert ours.keys() == slow.keys()
    for name, grad in slow.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-4, atol=1e-7)  # norms are float32


@pytest.mark.parametrize("loss_type", _OF_SUMS)
def test_every_method_trains_and_evaluates(loss_type: str, tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, tiny_model("llama"), loss_type=loss_type, max_steps=6)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] != before["eval_loss"]
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    if trainer.args.loss.needs_reference:
        assert before["eval_rewards/margins"] == pytest.approx(0.0, abs=1e-4)
        assert before["eval_rewards/chosen"] == pytest.approx(0.0, abs=1e-4)


def test_a_reference_that_is_kept_is_the_live_one(tmp_path: Path) -> None:
    logs = []
    for mode in ("cached", "live"):
        trainer = _trainer(tmp_path / mode, tiny_model("llama"), reference=mode, max_steps=4)
        trainer.train()
        logs.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert logs[0] == pytest.approx(logs[1], abs=1e-6)
    assert logs[0][0] == pytest.approx(0.6931, abs=1e-3)


@pytest.mark.parametrize("kind", ["goes on", "in full", "pissa"])
def test_the_reference_is_the_model_as_it_came(kind: str, tmp_path: Path) -> None:
    """Not the base below an adapter that goes on, nor what such a start left of it."""
    model, peft_config = tiny_model("llama"), "auto"
    if kind == "goes on":
        model = get_peft_model(model, LoraConfig(target_modules="all-linear"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    if kind == "pissa":
        peft_config = LoraConfig(target_modules="all-linear", init_lora_weights="pissa")
    came = copy.deepcopy(model)
    trainer = _trainer(tmp_path, model, None if kind == "in full" else peft_config)
    trainer.train()
    reference, pairs = trainer.pair_step.reference, random_pairs(12)
    with torch.no_grad():
        wanted = torch.stack(_sides(came.eval(), pairs), 1).flatten()
        now = torch.stack(_sides(trainer.model.eval(), pairs), 1).flatten()
    torch.testing.assert_close(reference.sums(pairs), wanted, rtol=1e-4, atol=1e-3)
    assert (now - wanted).abs().max() > 0.1
    others = random_pairs(3, seed=77)
    if kind == "in full":  # nothing keeps what it was
        with pytest.raises(ValueError, match="3 of these pairs were not there when the run began"):
            trainer.evaluate(others)
        return
    trainer.evaluate(others)
    with torch.no_grad():
        wanted = torch.stack(_sides(came.eval(), others), 1).flatten()
    torch.testing.assert_close(reference.sums(others), wanted, rtol=1e-4, atol=1e-3)


def test_trained_in_full_a_live_reference_keeps_a_copy(tmp_path: Path) -> None:
    model = tiny_model("llama")
    came = copy.deepcopy(model)
    trainer = _trainer(tmp_path, model, None, reference="live")
    trainer.train()
    others = random_pairs(3, seed=77)
    trainer.evaluate(others)
    with torch.no_grad():
        wanted = torch.stack(_sides(came.eval(), others), 1).flatten()
    torch.testing.assert_close(
        trainer.pair_step.reference.sums(others), wanted, rtol=1e-4, atol=1e-3
    )


def test_another_model_as_the_reference(tmp_path: Path) -> None:
    torch.manual_seed(5)
    other = tiny_model("llama", seed=3)
    trainer = _trainer(tmp_path, tiny_model("llama"), ref_model=other)
    trainer.train()
    pairs = random_pairs(12)
    with torch.no_grad():
        wanted = torch.stack(_sides(other.eval(), pairs), 1).flatten()
    torch.testing.assert_close(
        trainer.pair_step.reference.sums(pairs), wanted, rtol=1e-4, atol=1e-3
    )
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="ref_model is the model that is trained"):
        _trainer(tmp_path, model, None, ref_model=model)
    with pytest.raises(ValueError, match="loss_type='cpo' measures from no reference model"):
        _trainer(tmp_path, tiny_model("llama"), loss_type="cpo", ref_model=other)


def test_the_reference_of_a_resumed_run_is_the_first_ones(tmp_path: Path) -> None:
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = _trainer(tmp_path / "whole", tiny_model("llama"), **options)
    whole.train()
    again = _trainer(tmp_path / "whole", tiny_model("llama"), **options)
    calls: list[int] = []
    score = again.pair_step.reference._score
    again.pair_step.reference._score = lambda pairs: calls.append(len(pairs)) or score(pairs)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert calls == []
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, dict(again.model.named_parameters())[name])


def test_a_pair_is_known_by_its_tokens() -> None:
    pair = TokenizedPair(0, [1, 2], [3], [4, 5])
    assert key_of(pair) == key_of(TokenizedPair(9, [1, 2], [3], [4, 5]))
    others = [
        TokenizedPair(0, [1], [2, 3], [4, 5]), TokenizedPair(0, [1, 2], [3, 4], [5]),
        TokenizedPair(0, [1, 2], [3], [5, 4]), TokenizedPair(0, [1, 2], [3], [4, 5], [7]),
    ]  # fmt: skip
    assert len({key_of(pair), *map(key_of, others)}) == 5
