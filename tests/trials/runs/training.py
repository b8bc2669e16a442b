"""Checks 2, 5, 6: bad numbers, exact resume, accumulation."""

from __future__ import annotations

import contextlib
import functools
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import TrainerCallback

from rmipo_lite.checkpoints.sealed_folder import newest_valid_checkpoint
from rmipo_lite.training.trainer import RMiPOTrainer
from tests.kit import (
    equal_weights,
    logged_losses,
    random_pairs,
    tiny_model,
    tiny_trainer,
    trained_weights,
)
from tests.trials.runs.faults import PLACES, Poison
from tests.trials.scorecard import Check, Trial, Trials, expect

_VALUES = (math.nan, math.inf, -math.inf)
_STEPS = 5
_STEP_NAMES = {1: "the first step", 3: "a step in the middle", _STEPS: "the last step"}


# ---- 2: NaN and inf -------------------------------------------------------------------------


def bad_numbers(trials: Trials) -> None:
    """NaN or inf in loss, logits, gradient or weights, in one step or in all that follow."""
    for trial in trials:
        with trial:
            kind = trial.index % 5
            if kind < len(PLACES):
                _one_bad_pair(trial, kind)
            elif kind == 3:
                _bad_weight(trial)
            else:
                _nothing_but_bad_pairs(trial)


class _Victim:
    """Chooses one row of the first micro-step it is shown, and stays with it."""

    def __init__(self, place: int) -> None:
        self._place = place
        self.row: int | None = None

    def __call__(self, rows: Sequence[int]) -> set[int]:
        if self.row is None:
            self.row = list(rows)[self._place % len(rows)]
        return {self.row} & set(rows)


def _one_bad_pair(trial: Trial, kind: int) -> None:
    place, value = PLACES[kind], trial.rng.choice(_VALUES)
    step = trial.rng.choice(list(_STEP_NAMES))
    budget = trial.rng.choice(("auto", 1, 60))  # one micro-step, one a pair, a few
    trial.tried = f"{value} in the {place} of a pair, {_STEP_NAMES[step]}, budget {budget}"
    options: dict[str, Any] = {"max_steps": _STEPS, "max_tokens_per_microstep": budget}
    victim = _Victim(trial.rng.randrange(4))
    trainer = tiny_trainer(trial.folder / "bad", **options)
    out = io.StringIO()
    with Poison(trainer, place, value, step, victim), contextlib.redirect_stdout(out):
        trainer.train()
    expect(trainer.dropped_pairs == [{"row": victim.row, "step": step}], "the pair was not named")
    expect(f"not finite (row {victim.row})" in out.getvalue(), "no line names the row")
    losses = logged_losses(trainer)
    expect(len(losses) == _STEPS and all(0 < loss < 99 for loss in losses), f"log: {losses}")
    expect(
        equal_weights(
            trained_weights(trainer), _run_without(trial.folder / "good", victim.row, step, options)
        ),
        "the weights aren't those of the run without that pair in that step",
    )


def _run_without(
    folder: Path, row: int | None, step: int, options: dict[str, Any]
) -> dict[str, Tensor]:
    """Weights of a run in which a pair is simply absent from one step."""
    trainer = tiny_trainer(folder, **options)
    real = trainer.training_step

    def filtered(model: Any, inputs: dict[str, Any], *rest: Any) -> Tensor:
        if trainer.state.global_step + 1 == step:
            inputs = {"pairs": [pair for pair in inputs["pairs"] if pair.row != row]}
        return real(model, inputs, *rest)

    with mock.patch.object(trainer, "training_step", filtered):
        trainer.train()
    return trained_weights(trainer)


class _SpoilWeight(TrainerCallback):
    """Writes a bad number into a trained weight before a step."""

    def __init__(self, step: int, value: float) -> None:
        self._step, self._value = step, value
        self.name = ""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self._step:
            named = kwargs["model"].named_parameters()
            self.name, weight = next((n, p) for n, p in named if p.requires_grad)
            weight.data.view(-1)[0] = self._value


def _bad_weight(trial: Trial) -> None:
    """A weight itself goes bad: the run stops, nothing of it is saved, resume makes it whole."""
    step, value = trial.rng.choice(list(_STEP_NAMES)), trial.rng.choice(_VALUES)
    trial.tried = f"{value} in a weight before {_STEP_NAMES[step]}"
    options: dict[str, Any] = {"max_steps": _STEPS, "save_strategy": "steps", "save_steps": 1}
    spoil = _SpoilWeight(step, value)
    trainer = tiny_trainer(trial.folder / "run", callbacks=[spoil], **options)
    try:
        trainer.train()
    except FloatingPointError as error:
        expect(f"step {step}" in str(error), f"the message names no step: {error}")
        expect(spoil.name in str(error), f"the message names no weight: {error}")
    else:
        expect(False, "the run went on with a weight that isn't finite")
    newest, skipped = newest_valid_checkpoint(trial.folder / "run")
    expect(not skipped, f"bad checkpoints: {skipped}")
    expect(newest is None if step == 1 else newest is not None, f"newest checkpoint: {newest}")
    again = tiny_trainer(trial.folder / "run", **options)
    again.train(resume_from_checkpoint=None if newest is None else str(newest))
    whole = tiny_trainer(trial.folder / "whole", max_steps=_STEPS)
    whole.train()
    expect(
        equal_weights(trained_weights(again), trained_weights(whole)),
        "resumed after the fault, the weights differ from the undisturbed run's",
    )


def _nothing_but_bad_pairs(trial: Trial) -> None:
    """Every pair is bad from a step on: the run stops after k steps, as it was before them."""
    place, value = trial.rng.choice(PLACES), trial.rng.choice(_VALUES)
    first, patience = trial.rng.choice((1, 3)), trial.rng.choice((1, 2))
    trial.tried = f"{value} in the {place} of every pair from step {first}, stop after {patience}"
    trainer = tiny_trainer(trial.folder / "bad", max_steps=9, max_dropped_in_a_row=patience)
    poison = Poison(
        trainer, place, value, None,
        lambda rows: set(rows) if trainer.state.global_step + 1 >= first else set(),
    )  # fmt: skip
    try:
        with poison:
            trainer.train()
    except FloatingPointError as error:
        stop = f"stopped at step {first + patience - 1}: {patience} optimizer steps in a row"
        expect(stop in str(error), f"message: {error}")
    else:
        expect(False, "the run did not stop")
    expect(all(loss > 0 for loss in logged_losses(trainer)), "the log shows a dropped step's loss")
    bad = [entry for entry in trainer.state.log_history if entry.get("grad_norm") == 0]
    expect(not bad, f"the log shows a dropped step's gradient norm: {bad}")
    whole = tiny_trainer(trial.folder / "good", max_steps=9, callbacks=[_StopAfter(first - 1)])
    weights = trained_weights(whole)
    if first > 1:
        whole.train()
        weights = trained_weights(whole)
    expect(equal_weights(trained_weights(trainer), weights), "a dropped step changed a weight")


class _StopAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step >= self._step


# ---- 5: resume ------------------------------------------------------------------------------

_RESUME_STEPS = 30
# Ten pairs, four a step: three steps an epoch, the last one of two pairs.
_RESUME_VARIANTS: tuple[dict[str, Any], ...] = (
    {"disable_dropout": False, "optim": "adamw_torch"},
    {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "prior": "cached"},
    {"max_tokens_per_microstep": 1, "disable_dropout": False, "sft_weight": 0.1},
)


def exact_resume(trials: Trials) -> None:
    """A run cut after any step, or in the middle of the next, ends as the uninterrupted one."""
    wholes: dict[int, tuple[Path, dict[str, Tensor], list[float]]] = {}
    for trial in trials:
        with trial:
            variant, step = trial.index % len(_RESUME_VARIANTS), trial.index + 1
            in_step = trial.rng.random() < 0.5 and step < _RESUME_STEPS
            where = f"in the middle of step {step + 1}" if in_step else f"after step {step}"
            trial.tried = f"cut {where} of {_RESUME_STEPS}, {_RESUME_VARIANTS[variant]}"
            if variant not in wholes:
                wholes[variant] = _whole_run(trials.folder / f"whole-{variant}", variant)
            folder, weights, losses = wholes[variant]
            checkpoint = folder / f"checkpoint-{step}"
            if in_step:
                checkpoint = _cut_in_step(trial, variant, checkpoint, step + 1)
            torch.manual_seed(trial.index)  # nothing may depend on the state of the new process
            resumed = _resume_trainer(trial.folder / "resumed", variant)
            resumed.train(resume_from_checkpoint=str(checkpoint))
            expect(equal_weights(trained_weights(resumed), weights), "the weights differ")
            expect(logged_losses(resumed) == losses, "the logged losses differ")


def _resume_trainer(folder: Path, variant: int, **options: Any) -> RMiPOTrainer:
    model = tiny_model(attention_dropout=0.1)
    settings = {"max_steps": _RESUME_STEPS, "logging_steps": 4, **_RESUME_VARIANTS[variant]}
    return tiny_trainer(folder, model=model, pairs=random_pairs(10), **settings, **options)


def _whole_run(folder: Path, variant: int) -> tuple[Path, dict[str, Tensor], list[float]]:
    trainer = _resume_trainer(
        folder, variant, save_strategy="steps", save_steps=1, save_total_limit=_RESUME_STEPS + 1
    )
    trainer.train()
    return folder, trained_weights(trainer), logged_losses(trainer)


def _cut_in_step(trial: Trial, variant: int, checkpoint: Path, step: int) -> Path:
    """Resume, fail after the step's first backward pass; the checkpoint to go on from."""
    trainer = _resume_trainer(
        trial.folder / "cut", variant, save_strategy="steps", save_steps=1, save_total_limit=2
    )
    real, passes = trainer.accelerator.backward, []

    def failing(loss: Tensor, **options: Any) -> None:
        real(loss, **options)
        passes.append(loss)
        if trainer.state.global_step + 1 == step:
            raise RuntimeError("planted")

    with (
        mock.patch.object(trainer.accelerator, "backward", failing),
        contextlib.suppress(RuntimeError),
    ):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    expect(passes, "the step was never reached")
    return checkpoint


# ---- 6: accumulation ------------------------------------------------------------------------

_SPLITS = ((8, 1), (4, 2), (2, 4), (1, 8))


class _KeepGradient(TrainerCallback):
    """Copies the gradient of every optimizer step as the optimizer is about to see it."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        grads = [p.grad.flatten() for p in kwargs["model"].parameters() if p.grad is not None]
        self.steps.append(torch.cat(grads).double())


def accumulation(trials: Trials) -> None:
    """8 x 1, 4 x 2, 2 x 4, 1 x 8 and any cut by tokens: one gradient, short last window too."""
    for trial in trials:
        with trial:
            size, parts = _SPLITS[trial.index % len(_SPLITS)]
            count = trial.rng.choice((8, 11, 13))  # 11: the second step has three pairs
            budget = trial.rng.choice(("auto", 1, 40, 120))
            packing = trial.rng.random() < 0.7
            seed = trial.rng.randrange(1000)
            trial.tried = f"{size} x {parts}, budget {budget}, packing {packing}, {count} pairs"
            gradient = functools.partial(_gradients, count=count, seed=seed, packing=packing)
            ours = gradient(
                trial.folder / "a",
                per_device_train_batch_size=size,
                gradient_accumulation_steps=parts,
                max_tokens_per_microstep=budget,
            )
            whole = gradient(trial.folder / "b", per_device_train_batch_size=8)
            expect(len(ours) == len(whole) == -(-count // 8), "another number of steps")
            for step, (a, b) in enumerate(zip(ours, whole, strict=True), 1):
                ratio = float(a.norm() / b.norm())
                expect(abs(ratio - 1) < 1e-5, f"step {step}: gradients in the ratio {ratio:.7f}")
                error = float((a - b).norm() / b.norm())
                expect(error < 1e-5, f"step {step}: relative difference {error:.2g}")


def _gradients(folder: Path, count: int, seed: int, packing: bool, **options: Any) -> list[Tensor]:
    keep = _KeepGradient()
    tiny_trainer(
        folder,
        pairs=random_pairs(count, seed),
        callbacks=[keep],
        max_steps=-(-count // 8),
        learning_rate=0.0,  # so that the second step's gradient compares too
        max_grad_norm=0.0,
        packing=packing,
        **options,
    ).train()
    return keep.steps


CHECKS = [
    Check(2, "NaN and inf: pair named and dropped, weights stay whole", 40, bad_numbers),
    Check(5, "resume after any step, bit for bit", _RESUME_STEPS, exact_resume),
    Check(6, "accumulation: one gradient whatever the split", 40, accumulation),
]
