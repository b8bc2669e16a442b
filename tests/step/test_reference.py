"""Methods of sums in steps of a run: gradients by plain transformers, and what the reference is."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import TrainerCallback

from rmipo_lite.adapters.start import moved_towards, trained_weights
from rmipo_lite.checkpoints.sealed_folder import CheckpointError
from rmipo_lite.config import RMiPOConfig
from rmipo_lite.methods.table import SumLoss, method_named, methods
from rmipo_lite.model import batch
from rmipo_lite.step.reference import key_of
from rmipo_lite.tokens.pair import TokenizedPair
from rmipo_lite.training.rehearsal import plan_run
from rmipo_lite.training.trainer import RMiPOTrainer
from tests.kit import random_pairs, tiny_model, word_tokenizer
from tests.methods.golden import needs_golden, numbers, recorded

_OF_SUMS = [name for name, method in methods().items() if isinstance(method, SumLoss)]
_REMEMBERING = [name for name, method in methods().items() if method.remembers]
# From ratios (sums, where there is no reference) of both sides, beta and lengths.
_BY_HAND = {
    "dpo": lambda c, r, beta, n: F.softplus(-beta * (c - r)),
    "apo_zero": lambda c, r, beta, n: torch.sigmoid(-beta * c) + torch.sigmoid(beta * r),
    "kto": lambda c, r, beta, n: torch.cat([
        torch.sigmoid(-beta * (c[::2] - _mismatched(c, r))),
        torch.sigmoid(-beta * (_mismatched(c, r) - r[1::2])),
    ]),
    "kto_pair": lambda c, r, beta, n: (
        torch.sigmoid(-beta * (c - r.mean().clamp(min=0)))
        + torch.sigmoid(-beta * (c.mean().clamp(min=0) - r))
    ) / 2,
    "cpo": lambda c, r, beta, n: F.softplus(-beta * (c - r)),
    "orpo": lambda c, r, beta, n: beta * F.softplus(-(_odds(c / n[0]) - _odds(r / n[1]))),
    "ipo": lambda c, r, beta, n: (c / n[0] - r / n[1] - 1 / (2 * beta)) ** 2,
}  # fmt: skip


def _mismatched(chosen: Tensor, rejected: Tensor) -> Tensor:
    return torch.cat([chosen[1::2], rejected[::2]]).detach().mean().clamp(min=0)


def _pairs(count: int, loss_type: str, seed: int = 0) -> list[TokenizedPair]:
    """Of a method of unpaired rows every second label is true."""
    pairs = random_pairs(count, seed=seed) if seed else random_pairs(count)
    if not method_named(loss_type).unpaired:
        return pairs
    return [replace(pair, label=number % 2 == 0) for number, pair in enumerate(pairs)]


def _odds(mean: Tensor) -> Tensor:
    return mean - torch.log1p(-mean.exp())


def _trainer(folder: Path, model: Any, peft_config: Any = "auto", **options: Any) -> RMiPOTrainer:
    settings = {"max_steps": 2, "per_device_train_batch_size": 6, "save_strategy": "no", **options}
    loss_type = settings.setdefault("loss_type", "dpo")
    ref_model, pairs = settings.pop("ref_model", None), settings.pop("pairs", None)
    args = RMiPOConfig(
        str(folder), disable_tqdm=True, eval_completions=0, use_cpu=True, logging_steps=1,
        **{"learning_rate": 1e-2, **settings},
    )  # fmt: skip
    return RMiPOTrainer(
        model, args, train_dataset=pairs or _pairs(12, loss_type),
        eval_dataset=_pairs(5, loss_type, seed=9),
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
    pairs = _pairs(12, loss_type)[:6]
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
    if trainer.args.loss.needs_reference and loss_type != "alpha_dpo":  # SimPO's, mostly
        assert before["eval_rewards/margins"] == pytest.approx(0.0, abs=1e-4)
        assert before["eval_rewards/chosen"] == pytest.approx(0.0, abs=1e-4)


def _gradients(trainer: RMiPOTrainer, pairs: list[TokenizedPair], max_tokens: int) -> Any:
    trainer.model.zero_grad()
    trainer.pair_step.max_tokens = max_tokens
    with trainer.pair_step.put_back():
        outcome = trainer.pair_step.train(pairs, lambda loss: loss.backward())
        remembered = dict(trainer.pair_step.memory.now)
    grads = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    losses = dict(zip(outcome.rows, torch.cat([part.loss for part in outcome.values]), strict=True))
    return grads, remembered, losses, len(outcome.values)


@pytest.mark.parametrize("loss_type", _REMEMBERING)
def test_one_step_is_one_update(loss_type: str, tmp_path: Path) -> None:
    """Whatever its micro-steps are; evaluations, plans and searches are none."""
    trainer = _trainer(tmp_path, tiny_model("llama").double(), loss_type=loss_type)
    trainer.train()
    memory, pairs = trainer.pair_step.memory, random_pairs(12)[:6]
    assert memory.now["steps"] == 2
    was = dict(memory.now)
    # In the micro-steps' order: chance draws by place.
    parts = batch.split_by_budget(pairs, 40, packing=True)
    pairs = [pair for part in parts for pair in part]
    whole, in_pieces = (_gradients(trainer, pairs, tokens) for tokens in (4096, 40))
    assert (whole[3], in_pieces[3] > 2) == (1, True)
    assert whole[1].keys() == in_pieces[1].keys()
    for name, value in whole[1].items():
        assert in_pieces[1][name] == pytest.approx(value, rel=1e-6)
    for row, loss in whole[2].items():
        torch.testing.assert_close(in_pieces[2][row], loss, rtol=1e-6, atol=1e-9)
    for name, grad in whole[0].items():
        torch.testing.assert_close(in_pieces[0][name], grad, rtol=1e-4, atol=1e-7)
    trainer.evaluate()
    plan_run(trainer)
    trainer.args.learning_rate = "auto"
    trainer.find_learning_rate()
    assert memory.now == was


def test_epsilon_dpo_is_the_plain_one(tmp_path: Path) -> None:
    """Signs and loss from both models' whole logits, after steps that set them apart."""
    model = tiny_model("llama").double()
    reference = copy.deepcopy(model)
    trainer = _trainer(
        tmp_path,
        model,
        loss_type="epsilon_dpo",
        max_tokens_per_microstep=60,
        epsilon=0.1,
        max_steps=4,
    )
    trainer.train()
    pairs, beta = random_pairs(12)[:6], trainer.pair_step.memory.now["beta"]
    assert beta != trainer.args.beta
    _, after, losses, _ = _gradients(trainer, pairs, 60)
    signs, trainer.model = [], trainer.model.eval()
    with torch.no_grad():
        chosen, rejected = _sides(trainer.model, pairs)
        of_chosen, of_rejected = _sides(reference, pairs)
        for pair in pairs:
            less, same, more = (
                _tilted(trainer.model, reference, pair, pair.chosen_ids, e)
                - _tilted(trainer.model, reference, pair, pair.rejected_ids, e)
                for e in (-0.1, 0.0, 0.1)
            )
            signs.append(int(more > same > less) - int(more < same < less))
    assert {-1, 1} & set(signs)
    scale = beta / (1 + 0.1 * torch.tensor(signs, dtype=torch.float64))
    wanted = F.softplus(-scale * (chosen - of_chosen - rejected + of_rejected))
    for pair, loss in zip(pairs, wanted, strict=True):
        assert losses[pair.row].item() == pytest.approx(loss.item(), rel=1e-5)
    assert after["beta"] == pytest.approx(beta / (1 + 0.1 * sum(signs) / 6), rel=1e-12)


def _tilted(model: Any, other: Any, pair: TokenizedPair, response: list[int], e: float) -> Tensor:
    ids = torch.tensor([[*pair.prompt_ids, *response]])
    logits = (1 + e) * model(ids).logits[0, :-1] - e * other(ids).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, ids[0, 1:, None])[-len(response) :].sum()


@pytest.mark.parametrize("kind", ["lora", "in full"])
@pytest.mark.parametrize("share", [1.0, 0.6])
def test_a_moving_reference(kind: str, share: float, tmp_path: Path) -> None:
    """TR-DPO: after every second step it is the average of the weights, also of an adapter's."""
    model = tiny_model("llama")
    expected = copy.deepcopy(model)
    trainer = _trainer(
        tmp_path, model, "auto" if kind == "lora" else None, max_steps=4,
        ref_sync_steps=2, ref_sync_alpha=share,
    )  # fmt: skip
    moves: list[int] = []
    trainer.add_callback(_Averages(trainer, expected, share, moves))
    trainer.train()
    assert moves == [2, 4]
    pairs = random_pairs(12)
    trainer.pair_step.reference.know(pairs)
    with torch.no_grad():
        wanted = torch.stack(_sides(expected.eval(), pairs), 1).flatten()
        now = torch.stack(_sides(trainer.model.eval(), pairs), 1).flatten()
    torch.testing.assert_close(
        trainer.pair_step.reference.sums(pairs), wanted, rtol=1e-5, atol=1e-3
    )
    if share < 1:
        assert (now - wanted).abs().max() > 0.01


class _Averages(TrainerCallback):
    """The average of whole weights, kept beside."""

    def __init__(self, trainer: Any, expected: Any, share: float, moves: list[int]) -> None:
        self.trainer, self.expected, self.share, self.moves = trainer, expected, share, moves

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % 2:
            return
        self.moves.append(state.global_step)
        model = copy.deepcopy(self.trainer.model)
        merged = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
        now = merged.state_dict()
        for name, weight in self.expected.state_dict().items():
            weight.lerp_(now[name], self.share)


@pytest.mark.parametrize(
    "options",
    [*({"loss_type": name} for name in _REMEMBERING), {"ref_sync_steps": 2},
     {"ref_sync_steps": 1, "ref_sync_alpha": 1.0}],
    ids=[*_REMEMBERING, "moving reference", "moving reference, hard"],
)  # fmt: skip
def test_what_is_remembered_is_in_the_checkpoint(options: Any, tmp_path: Path) -> None:
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, **options}
    whole = _trainer(tmp_path, tiny_model("llama"), **options)
    whole.train()
    again = _trainer(tmp_path, tiny_model("llama"), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, dict(again.model.named_parameters())[name])
    if whole.pair_step.memory is not None:
        assert again.pair_step.memory.now == whole.pair_step.memory.now
    pairs = random_pairs(5, seed=9)
    if whole.pair_step.reference is not None:
        for trainer in (whole, again):
            trainer.pair_step.reference.know(pairs)
        assert torch.equal(*(t.pair_step.reference.sums(pairs) for t in (whole, again)))


def test_a_reference_moves_where_it_can(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="averages weights, which this adapter's aren't made for"):
        _trainer(
            tmp_path, tiny_model("llama"), LoraConfig(target_modules="all-linear", use_dora=True),
            ref_sync_steps=2,
        )  # fmt: skip
    with pytest.raises(ValueError, match="ref_sync_steps moves the model's own start"):
        _trainer(tmp_path, tiny_model("llama"), ref_model=tiny_model("llama"), ref_sync_steps=2)
    with pytest.raises(ValueError, match="ref_sync_steps must be None, since loss_type='cpo'"):
        _trainer(tmp_path, tiny_model("llama"), loss_type="cpo", ref_sync_steps=2)


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
    score = again.pair_step.response_sums
    again.pair_step.response_sums = lambda pairs: calls.append(len(pairs)) or score(pairs)
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


def test_what_another_reference_said_is_not_taken_over(tmp_path: Path) -> None:
    """A checkpoint has the pairs' scores by its run's reference model, and by no other."""
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    other = tiny_model("llama").double().float()
    with torch.no_grad():
        other.model.embed_tokens.weight.mul_(1.1)
    _trainer(tmp_path, tiny_model("llama"), ref_model=copy.deepcopy(other), **options).train()
    for wrong in (tiny_model("llama"), None):
        again = _trainer(tmp_path, tiny_model("llama"), ref_model=wrong, **options)
        with pytest.raises(CheckpointError, match="another run: reference model is"):
            again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    same = _trainer(tmp_path, tiny_model("llama"), ref_model=other, **options)
    same.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert same.state.global_step == 2


@needs_golden
def test_recorded_moves_of_the_reference() -> None:
    runs = [run for run in recorded()["sequences"] if run["method"] == "tr_dpo"]
    for run in runs:
        model = torch.nn.Module()
        model.register_parameter("w", torch.nn.Parameter(numbers(run["initial"])))
        start = trained_weights(model)
        for step in run["steps"]:
            model.w.data = numbers(step["policy"])
            if step["global_step"] % run["opts"]["tau"] == 0:
                start = moved_towards(model, start, run["opts"]["alpha"])
            torch.testing.assert_close(start["w"], numbers(step["ref_after"]), rtol=1e-12, atol=0)
    assert len(runs) == 6
