"""What the plan measures: of the run's own steps, and little of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rmipo_lite.config import RMiPOConfig
from rmipo_lite.model import batch
from rmipo_lite.step.pair_step import PairStep
from rmipo_lite.training import rehearsal
from rmipo_lite.training.rehearsal import plan_run
from rmipo_lite.training.trainer import RMiPOTrainer
from tests.kit import random_pairs, tiny_model, tiny_trainer, word_tokenizer


def _watched(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Rows of every step that is computed."""
    seen: list[list[int]] = []
    real = PairStep.train

    def train(self: PairStep, pairs: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append([pair.row for pair in pairs])
        return real(self, pairs, *args, **kwargs)

    monkeypatch.setattr(PairStep, "train", train)
    return seen


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_steps_are_the_runs_own(
    accumulation: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = tiny_trainer(
        tmp_path, pairs=random_pairs(64), max_steps=5, per_device_train_batch_size=4,
        gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    coming = rehearsal._coming_steps(trainer, 5)
    assert trainer.accelerator._dataloaders == []
    seen = _watched(monkeypatch)
    trainer.train()
    assert [[pair.row for pair in pairs] for pairs in coming] == seen


@pytest.mark.parametrize("steps", [10, 20, 40, 100, 400])
def test_a_measurement_takes_a_twentieth_of_the_run(
    steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = random_pairs(256, longest=40)
    trainer = tiny_trainer(
        tmp_path, pairs=pairs, max_steps=steps, per_device_train_batch_size=16, learning_rate=1e-3
    )
    trainer.pair_step.max_tokens = 400
    seen = _watched(monkeypatch)
    plan = plan_run(trainer)
    work = {pair.row: batch.packed_length(pair) for pair in pairs}
    spent = sum(work[row] for rows in seen for row in rows)
    whole = steps * 16 * sum(work.values()) / len(work)
    assert spent <= 0.055 * whole
    assert (plan.seconds is not None) == bool(seen)
    if steps >= 100:
        assert plan.memory is not None
        assert max(sum(work[row] for row in rows) for rows in seen) == plan.micro_step_tokens


def test_a_resumed_runs_plan_says_what_is_left(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, pairs=random_pairs(32), max_steps=30, learning_rate=1e-3)
    plan = plan_run(trainer, done=26)
    assert (plan.steps, plan.left, plan.seconds) == (30, 4, None)  # too little to be measured
    assert str(plan).startswith("Plan: 4 of 30 steps of 4 pairs are left, micro-steps")
    assert "more before them" not in str(plan)


@pytest.mark.parametrize("peft_config", ["auto", None])
@pytest.mark.parametrize("share", [0.6, 1.0])
def test_a_moving_reference_is_in_the_plan(peft_config: Any, share: float, tmp_path: Path) -> None:
    """Its weights are in every checkpoint, and of full training in memory beside the model."""

    def planned(folder: str, **options: Any) -> Any:
        args = RMiPOConfig(
            str(tmp_path / folder), max_steps=8, save_steps=4, learning_rate=1e-3, use_cpu=True,
            loss_type="dpo", save_total_limit=1, per_device_train_batch_size=4, **options,
        )  # fmt: skip
        trainer = RMiPOTrainer(
            tiny_model(), args, train_dataset=random_pairs(32), processing_class=word_tokenizer(),
            peft_config=peft_config,
        )  # fmt: skip
        return trainer, plan_run(trainer)

    _, plain = planned("plain")
    trainer, plan = planned("moving", ref_sync_steps=2, ref_sync_alpha=share)
    trainer.train()
    trainer.save_model(str(tmp_path / "moving"))
    files = [path for path in (tmp_path / "moving").rglob("*") if path.is_file()]
    kept = rehearsal._kept_bytes(trainer)
    assert (kept > 0) == (peft_config is None)
    assert plan.disk > plain.disk
    # One checkpoint more while it is replaced.
    newest = [path for path in files if "checkpoint-8" in path.parts]
    taken = sum(path.stat().st_size for path in (*files, *newest))
    assert plan.disk == pytest.approx(taken, rel=0.15)
