"""`learning_rate="auto"` in a trainer: found, put back, and the same run as with the number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rmipo_lite.checkpoints.sealed_folder import CheckpointError
from rmipo_lite.config import RMiPOConfig
from rmipo_lite.ops.losses import LOSSES
from rmipo_lite.step.likely_words import LikelyWords
from rmipo_lite.training.interrupt import GracefulInterrupt
from rmipo_lite.training.trainer import RMiPOTrainer
from tests.kit import (
    equal_weights,
    random_pairs,
    tiny_model,
    tiny_trainer,
    trained_weights,
    word_tokenizer,
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"lr_scheduler_type": "cosine", "warmup_steps": 2},
        {
            "lr_scheduler_type": "reduce_lr_on_plateau",
            "gradient_accumulation_steps": 2,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "eval_completions": 0,
        },
        {"lr_scheduler_type": "constant_with_warmup", "optim": "sgd", "neftune_noise_alpha": 5.0},
    ],
)
def test_the_run_is_that_with_the_number_by_hand(options: dict[str, Any], tmp_path: Path) -> None:
    options["eval_pairs"] = random_pairs(4, seed=9)
    searched = tiny_trainer(tmp_path / "auto", learning_rate="auto", **options)
    searched.train()
    assert searched.learning_rate == searched.found_rate
    assert searched.run_steps() == searched.state.global_step
    given = tiny_trainer(tmp_path / "hand", learning_rate=searched.found_rate, **options)
    given.train()
    assert equal_weights(trained_weights(searched), trained_weights(given))
    logged = [
        [{k: v for k, v in entry.items() if k in ("loss", "learning_rate")} for entry in logs]
        for logs in (searched.state.log_history, given.state.log_history)
    ]
    assert logged[0] == logged[1]


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("in_full", [False, True])
def test_every_loss_and_full_training_find_one(
    loss_type: str, in_full: bool, tmp_path: Path
) -> None:
    trainer = RMiPOTrainer(
        tiny_model(),
        RMiPOConfig(str(tmp_path), loss_type=loss_type, per_device_train_batch_size=4, max_steps=2),
        train_dataset=random_pairs(8),
        processing_class=word_tokenizer(),
        peft_config=None if in_full else "auto",
    )
    before = trained_weights(trainer)
    trainer.find_learning_rate()
    assert equal_weights(before, trained_weights(trainer))
    assert all(p.grad is None for p in trainer.model.parameters())
    assert trainer.optimizer is None
    assert 1e-6 < trainer.found_rate < 1


@pytest.mark.parametrize("options", [{"sft_weight": 0.0}, {"loss_type": "dpo"}])
def test_a_loss_that_nothing_holds_learns_at_half(
    options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = tiny_trainer(tmp_path, learning_rate="auto", **options)
    trainer.find_learning_rate()
    whole = trainer.range_test.learning_rate(trainer._schedule_factors(), is_held=True)
    assert trainer.found_rate == whole / 2
    assert "half of it, since without sft_weight" in capsys.readouterr().out


@pytest.mark.slow
def test_a_resumed_run_keeps_what_was_found(tmp_path: Path) -> None:
    options: dict[str, Any] = {"learning_rate": "auto", "max_steps": 4}
    whole = tiny_trainer(tmp_path, save_strategy="steps", save_steps=2, **options)
    whole.train()
    resumed = tiny_trainer(tmp_path, **options)
    resumed._step_at = None  # never called
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.found_rate == whole.found_rate
    assert equal_weights(trained_weights(whole), trained_weights(resumed))


def test_an_optimizer_that_is_given_has_a_rate_of_its_own(tmp_path: Path) -> None:
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    trainer = RMiPOTrainer(
        model,
        RMiPOConfig(str(tmp_path), learning_rate="auto", max_steps=1, logging_steps=1),
        train_dataset=random_pairs(4),
        processing_class=word_tokenizer(),
        optimizers=(optimizer, None),
    )
    trainer.train()
    assert trainer.learning_rate == 0.25
    assert trainer.found_rate is None


def test_ctrl_c_in_the_search_leaves_the_weights(tmp_path: Path) -> None:
    interrupt = GracefulInterrupt()
    trainer = tiny_trainer(tmp_path, learning_rate="auto", callbacks=[interrupt])
    before = trained_weights(trainer)
    step = trainer._step_at

    def pressed(*given: Any) -> None:
        step(*given)
        interrupt.requested = True

    trainer._step_at = pressed
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert equal_weights(before, trained_weights(trainer))
    assert trainer.found_rate is None


@pytest.mark.parametrize(
    ("options", "factors"),
    [
        ({"lr_scheduler_type": "constant", "warmup_steps": 0}, 10.0),
        ({"lr_scheduler_type": "linear", "warmup_steps": 0}, 5.5),  # 1, 0.9 ... 0.1
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 4}, 7.5),  # from 0 to 1
        ({"lr_scheduler_type": "cosine", "warmup_steps": 0}, 5.5),
        ({"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"}, 10.0),
        ({"max_steps": -1, "num_train_epochs": 5.0, "gradient_accumulation_steps": 2,
          "lr_scheduler_type": "constant", "warmup_steps": 0}, 5.0),  # 8 pairs of a step, 8 in all
    ],
)  # fmt: skip
def test_factors_of_the_schedule(options: dict[str, Any], factors: float, tmp_path: Path) -> None:
    trainer = tiny_trainer(
        tmp_path,
        **{"learning_rate": "auto", "max_steps": 10, "eval_pairs": random_pairs(2), **options},
    )
    assert trainer._schedule_factors() == pytest.approx(factors)


def test_what_no_rate_changes_is_an_error(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, learning_rate="auto", loss_type="hinge", beta=1e-30)
    trainer.pair_step.args.end_anchor = 0.0
    with pytest.raises(ValueError, match=r"no rate up to .* changes what the model says"):
        trainer.train()


def test_a_pair_whose_probabilities_are_no_numbers_is_left_out_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = tiny_trainer(tmp_path, learning_rate="auto")
    bad, keep = [trainer.train_dataset[2].row], LikelyWords._keep

    def planted(self: LikelyWords, *given: Any) -> dict[int, bool]:
        return {row: fine and row not in bad for row, fine in keep(self, *given).items()}

    monkeypatch.setattr(LikelyWords, "_keep", planted)
    trainer.find_learning_rate()
    assert trainer.found_rate > 1e-5
    assert f"probabilities that are no numbers: row {bad[0]}" in capsys.readouterr().out
    trainer.found_rate = None
    bad = [pair.row for pair in trainer.train_dataset]
    with pytest.raises(ValueError, match="of no pair that was measured are the probabilities"):
        trainer.find_learning_rate()


@pytest.mark.slow
def test_a_second_run_has_the_second_rate(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, learning_rate="auto", warmup_steps=0)
    for steps in (2, 6):
        trainer.args.max_steps = steps
        trainer.train()
        first = next(log for log in trainer.state.log_history if "learning_rate" in log)
        assert first["learning_rate"] == pytest.approx(trainer.found_rate)


def test_groups_with_a_multiple_keep_it_in_the_search(tmp_path: Path) -> None:
    """As LoRA+ has them."""
    trainer = tiny_trainer(tmp_path, learning_rate="auto")
    make, rates = trainer.create_optimizer, []

    def with_multiple(*given: Any) -> Any:
        optimizer = make(*given)
        optimizer.param_groups[-1]["lr"] *= 16
        step = optimizer.step
        optimizer.step = lambda: (rates.append([g["lr"] for g in optimizer.param_groups]), step())
        return optimizer

    trainer.create_optimizer = with_multiple
    trainer.find_learning_rate()
    assert len(rates) == trainer.range_test.taken
    assert all(group[-1] == pytest.approx(16 * group[0]) for group in rates if len(group) > 1)
    assert [group[-1] / 16 for group in rates] == pytest.approx(
        [rate for rate, _ in trainer.range_test.history]
    )


def test_weights_in_16_bits_are_refused(tmp_path: Path) -> None:
    """Where most of what is trained is in them; an adapter's are in 32."""
    options: dict[str, Any] = {
        "train_dataset": random_pairs(4), "processing_class": word_tokenizer(),
    }  # fmt: skip
    args = RMiPOConfig(str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match=r"learning_rate='auto': .* in 16 bits"):
        RMiPOTrainer(tiny_model().bfloat16(), args, peft_config=None, **options)
    RMiPOTrainer(tiny_model().bfloat16(), args, peft_config="auto", **options)
    args.learning_rate = 1e-4
    RMiPOTrainer(tiny_model().bfloat16(), args, peft_config=None, **options)


def test_a_rate_is_not_looked_for_in_the_middle_of_a_run(tmp_path: Path) -> None:
    tiny_trainer(tmp_path, save_strategy="steps", save_steps=2, max_steps=4).train()
    later = tiny_trainer(tmp_path, learning_rate="auto", max_steps=4)
    with pytest.raises(CheckpointError, match=r"learning_rate was .* there"):
        later.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
