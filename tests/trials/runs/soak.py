"""Check 44: a long run through kills, interrupts, full disks and bad numbers, one after another."""

from __future__ import annotations

import math
import random
import signal
import time
from pathlib import Path
from typing import Any
from unittest import mock

from safetensors.torch import load_file
from torch import Tensor

from rmipo_lite.adapters.saved import ADAPTER_FILE
from rmipo_lite.checkpoints.sealed_folder import newest_valid_checkpoint
from rmipo_lite.output.console import say
from rmipo_lite.training.interrupt import GracefulInterrupt
from tests.kit import equal_weights, tiny_model, tiny_trainer
from tests.trials.runs.children import start
from tests.trials.runs.faults import PLACES, Poison, files_of_at_most
from tests.trials.scorecard import Check, Trial, Trials, expect

_STEPS, _THOROUGH_STEPS = 1000, 10_000
_SAVE_STEPS = 20
_FAULTY_SAVES = 0.1  # share of the saves that find a full disk
_FAULTY_STEPS = 0.01  # share of the steps with a number that isn't finite, once
_ACTIONS = ("kill -9", "Ctrl-C", "Ctrl-C twice", "none")


def soak(trials: Trials) -> None:
    """Thousands of steps with every fault at random: the weights are those of the quiet run."""
    steps = _THOROUGH_STEPS if trials.thorough else _STEPS
    for trial in trials:
        with trial:
            trial.tried = f"{steps} steps"
            quiet = start(soak_job, str(trial.folder / "quiet"), steps, None,
                          output=trial.folder / "quiet.out")  # fmt: skip
            expect(quiet.wait(seconds=1800) == 0, f"the quiet run failed: {quiet.text()[-300:]}")
            counts = _through_faults(trial, steps)
            trial.tried = f"{steps} steps, {counts}"
            expect(
                equal_weights(_final(trial.folder / "quiet"), _final(trial.folder / "run")),
                "the weights differ from the quiet run's",
            )


def _through_faults(trial: Trial, steps: int) -> dict[str, int]:
    """Start the run again and again until it ends; how often what was done to it."""
    counts = dict.fromkeys(_ACTIONS, 0)
    run = trial.folder / "run"
    for attempt in range(steps):
        child = start(
            soak_job, str(run), steps, trial.rng.randrange(2**30),
            output=trial.folder / f"run-{attempt}.out",
        )  # fmt: skip
        action = trial.rng.choice(_ACTIONS)
        counts[action] += 1
        if action != "none":
            child.wait_for("going.")
            time.sleep(trial.rng.uniform(0, 4))
        if action == "kill -9":
            child.send(signal.SIGKILL)
        elif action != "none":
            child.send(signal.SIGINT)
            if action == "Ctrl-C twice":
                time.sleep(trial.rng.uniform(0, 0.02))
                child.send(signal.SIGINT)
        code = child.wait(seconds=1800)
        expect(code in (0, 130, -signal.SIGKILL), f"exit code {code}: {child.text()[-400:]}")
        if "ended." in child.text():
            return counts
    expect(False, f"it never came to its end: {counts}")
    return counts


def _final(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "final" / ADAPTER_FILE)


def soak_job(folder: str, steps: int, seed: int | None) -> None:
    """Go on with the run from its newest checkpoint; a seed brings faults with it."""
    run = Path(folder)
    interrupt = GracefulInterrupt()
    trainer = tiny_trainer(
        run,
        model=tiny_model(attention_dropout=0.1),
        count=10,
        max_steps=steps,
        disable_dropout=False,
        save_strategy="steps",
        save_steps=_SAVE_STEPS,
        logging_steps=50,
        learning_rate=1e-3,
        callbacks=[interrupt],
    )
    newest, skipped = newest_valid_checkpoint(run)
    if skipped:
        raise RuntimeError(f"a broken checkpoint was left: {skipped}")
    say("going.")
    resume = None if newest is None else str(newest)
    if seed is None:
        trainer.train(resume_from_checkpoint=resume)
    else:
        with _Faults(trainer, seed):
            trainer.train(resume_from_checkpoint=resume)
    if interrupt.stopped_at_step is None:
        trainer.save_model(str(run / "final"))
        say("ended.")


class _Faults:
    """Bad numbers that are over at the second look, and saves that find a full disk."""

    def __init__(self, trainer: Any, seed: int) -> None:
        self._trainer, self._rng = trainer, random.Random(seed)
        self._save, self._step = trainer._write_checkpoint, trainer.training_step

    def __enter__(self) -> _Faults:
        self._patches: list[Any] = [
            mock.patch.object(self._trainer, "_write_checkpoint", self._write),
            mock.patch.object(self._trainer, "training_step", self._train),
        ]
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *error: object) -> None:
        for patch in self._patches:
            patch.stop()

    def _write(self, trial: Any) -> None:
        if self._rng.random() > _FAULTY_SAVES:
            self._save(trial)
            return
        with files_of_at_most(int(10 ** self._rng.uniform(0, 4.2))):
            self._save(trial)

    def _train(self, model: Any, inputs: Any, *rest: Any) -> Tensor:
        if self._rng.random() > _FAULTY_STEPS:
            return self._step(model, inputs, *rest)
        place, value = self._rng.choice(PLACES), self._rng.choice((math.nan, math.inf))
        with Poison(self._trainer, place, value, None, set, once=True):
            return self._step(model, inputs, *rest)


CHECKS = [Check(44, "a long run through all of these at random", 1, soak)]
