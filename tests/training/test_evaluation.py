"""What transformers' Trainer promises holds in the methods that are ours."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback

import rmipo_lite
from rmipo_lite.config import RMiPOConfig
from rmipo_lite.tokens.pair import TokenizedPair
from rmipo_lite.training.trainer import RMiPOTrainer
from tests.kit import random_pairs, tiny_model, train_words, word_rows, word_tokenizer


def _trainer(
    folder: Path, *, eval_dataset: Any = None, callbacks: Any = None, **options: Any
) -> RMiPOTrainer:
    wanted = {"max_steps": 3, "per_device_train_batch_size": 4, "save_strategy": "no", **options}
    args = RMiPOConfig(
        str(folder), disable_tqdm=True, eval_completions=0, use_cpu=True, logging_steps=1, **wanted
    )
    return RMiPOTrainer(
        tiny_model("llama"),
        args,
        train_dataset=random_pairs(10),
        eval_dataset=random_pairs(5, seed=9) if eval_dataset is None else eval_dataset,
        processing_class=word_tokenizer(),
        peft_config="auto",
        callbacks=callbacks,
    )


def test_drop_last_drops_no_pair_of_an_evaluation(tmp_path: Path) -> None:
    options = {"per_device_eval_batch_size": 4, "max_steps": -1}
    plain, dropping = (
        _trainer(tmp_path / str(drop), dataloader_drop_last=drop, **options)
        for drop in (False, True)
    )
    assert dropping.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    assert len(dropping.get_train_dataloader()) == 2
    assert len(plain.get_train_dataloader()) == 3
    assert dropping.args.dataloader_drop_last


def test_grouping_by_length_brings_alike_pairs_together(tmp_path: Path) -> None:
    pairs = [TokenizedPair(row, [5] * 3, [6] * (4 + 20 * (row % 2)), [7] * 4) for row in range(400)]
    trainer = _trainer(tmp_path, train_sampling_strategy="group_by_length")
    trainer.train_dataset = pairs
    spread = [
        max(lengths) - min(lengths)
        for batch in trainer.get_train_dataloader()
        if (lengths := [len(pair.chosen_ids) for pair in batch["pairs"]])
    ]
    assert sum(width > 0 for width in spread) <= 4  # once in each of four sorted stretches
    assert {5, 6} <= {
        pair.row for batch in trainer.get_eval_dataloader(pairs) for pair in batch["pairs"]
    }


class _Modes(torch.optim.SGD):
    """An optimizer with two modes, as schedule-free ones have."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.modes: list[str] = []

    def train(self) -> None:
        self.modes.append("train")

    def eval(self) -> None:
        self.modes.append("eval")

    def step(self, closure: Any = None) -> Any:
        assert self.modes[-1] == "train"
        return super().step(closure)


def test_an_optimizer_with_modes_is_told_them(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, eval_strategy="steps", eval_steps=2, save_strategy="steps")
    trainer.optimizer = _Modes([p for p in trainer.model.parameters() if p.requires_grad], lr=0.1)
    trainer.train()
    modes = trainer.optimizer.optimizer.modes
    assert modes[-1] == "eval"
    assert modes.count("train") == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"metric_for_best_model": "accuracy"}, "no evaluation gives 'accuracy', wanted one of"),
        ({"optim": "sgd", "optim_args": "colour=3"}, "optim_args: sgd has no 'colour'"),
        ({"lr_scheduler_kwargs": {"colour": 3}}, "lr_scheduler_type, lr_scheduler_kwargs"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type, lr_scheduler_kwargs"),
        ({"optim": "adalomo"}, "optim: adalomo changes weights within the backward pass"),
        ({"callbacks": [EarlyStoppingCallback()]}, "EarlyStoppingCallback needs metric_for_best"),
    ],
)
def test_what_would_end_a_run_later_ends_it_before(
    options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        _trainer(tmp_path, **options)


def test_a_metric_of_one_of_several_sets_is_known(tmp_path: Path) -> None:
    sets = {"easy": random_pairs(3), "hard": random_pairs(4, seed=3)}
    _trainer(tmp_path, eval_dataset=sets, metric_for_best_model="eval_hard_rewards/margins")
    with pytest.raises(ValueError, match="easy_loss"):
        _trainer(tmp_path, eval_dataset=sets, metric_for_best_model="loss")


def test_a_held_out_token_outside_the_vocabulary_is_told(tmp_path: Path) -> None:
    bad = [TokenizedPair(0, [5], [10**6], [6])]
    with pytest.raises(ValueError, match="it gives token 1000000"):
        _trainer(tmp_path, eval_dataset=bad)
    with pytest.raises(ValueError, match="it gives token 1000000"):
        _trainer(tmp_path).evaluate(bad)


class _Heard(TrainerCallback):
    def __init__(self) -> None:
        self.events: list[str] = []


for _event in ("on_train_begin", "on_evaluate", "on_log", "on_step_end", "on_train_end"):
    setattr(
        _Heard,
        _event,
        lambda self, *args, _event=_event, **kwargs: self.events.append(_event),
    )


def test_callbacks_hear_of_nothing_before_the_run_begins(tmp_path: Path) -> None:
    heard = _Heard()
    result = train_words(
        tiny_model("llama"), tmp_path / "run", None, word_tokenizer(), callbacks=[heard]
    )
    assert result.metrics_before
    assert heard.events[0] == "on_train_begin"
    assert heard.events[-1] == "on_evaluate"
    assert heard.events.count("on_evaluate") == 1  # after the run; the one before was ours alone


def _logp_gap(model: Any, pair: TokenizedPair) -> float:
    """Chosen over rejected, mean log-prob of a token, by the model's own logits."""

    def mean_logp(response: list[int]) -> float:
        ids = torch.tensor([[*pair.prompt_ids, *response]])
        with torch.no_grad():
            logps = model.eval()(ids).logits[0, :-1].log_softmax(-1)
        return float(logps.gather(1, ids[0, 1:, None])[-len(response) :].mean())

    return mean_logp(pair.chosen_ids) - mean_logp(pair.rejected_ids)


def test_a_change_is_as_sure_as_its_pairs_agree(tmp_path: Path) -> None:
    held_out = random_pairs(7, seed=9)
    trainer = _trainer(tmp_path, eval_dataset=held_out, learning_rate=1e-2)
    trainer.evaluate_before()
    before = [_logp_gap(trainer.model, pair) for pair in held_out]
    trainer.train()
    trainer.evaluate()
    changes = [
        trainer.args.beta * (_logp_gap(trainer.model, pair) - was)
        for pair, was in zip(held_out, before, strict=True)
    ]
    wanted = statistics.stdev(changes) / math.sqrt(len(changes))
    assert wanted > 1e-2
    assert trainer.held_out_values.errors["eval_rewards/margins"] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.slow
def test_several_sets_by_name_in_train(tmp_path: Path) -> None:
    rows = word_rows(40)
    result = rmipo_lite.train(
        tiny_model("llama"), rows[:24], eval_dataset={"easy": rows[24:32], "hard": rows[32:]},
        tokenizer=word_tokenizer(), output_dir=tmp_path / "run", max_steps=2, use_cpu=True,
        per_device_train_batch_size=4, eval_completions=0,
    )  # fmt: skip
    assert {
        "eval_easy_loss",
        "eval_hard_loss",
    } <= result.metrics.keys() & result.metrics_before.keys()
    assert "held-out easy accuracy" in repr(result)
    assert "eval_hard_rewards/margins" in (result.output_dir / "README.md").read_text()
    assert len(result.held_out_prompts) > 8


def test_after_the_best_model_is_loaded_the_result_says_of_which_step(tmp_path: Path) -> None:
    result = train_words(
        tiny_model("llama"), tmp_path / "run", None, word_tokenizer(), max_steps=4,
        eval_strategy="steps", eval_steps=1, save_steps=1, load_best_model_at_end=True,
        metric_for_best_model="rewards/margins", greater_is_better=True, learning_rate=1e-2,
    )  # fmt: skip
    assert result.weights_step == 1
    assert "weights of step 1" in repr(result)
    assert "the weights are those of step 1, the best by rewards/margins" in " ".join(
        str(result.findings).split()
    )
    assert ", weights of step 1." in (result.output_dir / "README.md").read_text()
