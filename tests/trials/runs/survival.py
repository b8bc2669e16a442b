"""Checks 1, 7, 13, 14: kills, damaged checkpoints, Ctrl-C, full disks."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from peft import PeftModel
from torch import Tensor

from rmipo_lite.checkpoints import sealed_folder, state, trainer_mixin
from rmipo_lite.checkpoints.sealed_folder import (
    checkpoints,
    newest_valid_checkpoint,
    verify_checkpoint,
)
from rmipo_lite.selftest.survival import STEPS, expect_resumes, saving_trainer
from tests.kit import equal_weights, tiny_model, tiny_trainer, trained_weights
from tests.trials.runs import jobs
from tests.trials.runs.children import start
from tests.trials.runs.faults import files_of_at_most
from tests.trials.scorecard import Check, Trial, Trials, expect

# ---- 1: kill -9 -----------------------------------------------------------------------------


def kills(trials: Trials) -> None:
    """Kill a saving run at a random moment; what is left resumes to the uninterrupted weights."""
    whole = saving_trainer(trials.folder / "whole")
    whole.train()
    weights = trained_weights(whole)
    for trial in trials:
        with trial:
            step = trial.rng.randint(1, STEPS)
            word = trial.rng.choice(("begun", "stepped", "saved"))
            delay = trial.rng.uniform(0, 0.05)  # a step with its save takes about as long
            trial.tried = f"kill -9 {delay * 1000:.1f} ms after '{word} {step}'"
            run = trial.folder / "run"
            child = start(jobs.saving_run, str(run), output=trial.folder / "out")
            child.wait_for(f"{word} {step}.")
            time.sleep(delay)
            child.send(signal.SIGKILL)
            expect_resumes(run, child.wait(), child.text(), weights)


# ---- 7: damage ------------------------------------------------------------------------------

_DAMAGES: dict[str, Callable[[bytes, int], bytes | None]] = {
    "deleted": lambda content, place: None,
    "emptied": lambda content, place: b"",
    "cut": lambda content, place: content[:place],
    "lengthened": lambda content, place: content + b"\0",
    "a bit flipped": lambda content, place: (
        content[:place] + bytes([content[place] ^ (1 << place % 8)]) + content[place + 1 :]
    ),
}


def damage(trials: Trials) -> None:
    """Damage any file of the newest checkpoint: the one before is found, the file is named."""
    run = trials.folder / "run"
    trainer = saving_trainer(run)
    trainer.train()
    weights = trained_weights(trainer)
    *_, good, newest = checkpoints(run)
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    for trial in trials:
        with trial, _kept(newest, trial.folder / "copy"):
            name = list(_DAMAGES)[trial.index % len(_DAMAGES)]
            file = files[trial.index * 7 % len(files)]
            content = file.read_bytes()
            place = trial.rng.randrange(len(content))
            trial.tried = f"{file.name} {name} (byte {place} of {len(content)})"
            changed = _DAMAGES[name](content, place)
            if changed is None:
                file.unlink()
            else:
                file.write_bytes(changed)
            found, skipped = newest_valid_checkpoint(run)
            expect(found == good, f"took {found}")
            expect(len(skipped) == 1 and file.name in skipped[0][1], f"said {skipped}")
            if trial.index % 6 == 0:
                resumed = saving_trainer(run, callbacks=[])
                resumed.args.save_strategy = "no"
                resumed.train(resume_from_checkpoint=True)
                expect(equal_weights(trained_weights(resumed), weights), "the weights differ")


@contextlib.contextmanager
def _kept(folder: Path, copy: Path) -> Iterator[None]:
    """The folder is as it was after the block."""
    shutil.copytree(folder, copy)
    try:
        yield
    finally:
        shutil.rmtree(folder)
        shutil.copytree(copy, folder)


# ---- 13: Ctrl-C -----------------------------------------------------------------------------


def ctrl_c(trials: Trials) -> None:
    """Interrupt `train()` at a random moment, once or twice, also while it saves or evaluates."""
    with contextlib.redirect_stdout(io.StringIO()):
        weights = _adapter(jobs.asked_train(trials.folder / "whole", resume=False).model)
    for trial in trials:
        with trial:
            word = trial.rng.choice(("started", "begun", "stepped", "saved"))
            step = trial.rng.randint(1, jobs.ASKED_STEPS)
            if word == "saved":
                step = trial.rng.choice((3, 6, 9))
            aim = "started." if word == "started" else f"{word} {step}."
            delay = trial.rng.uniform(0, 0.4 if word == "started" else 0.06)
            pause = trial.rng.uniform(0, 0.05) if trial.index % 2 else None
            twice = "" if pause is None else f", again after {pause * 1000:.1f} ms"
            trial.tried = f"SIGINT {delay * 1000:.1f} ms after '{aim}'{twice}"
            run = trial.folder / "run"
            child = start(jobs.asked_run, str(run), False, output=trial.folder / "out")
            child.wait_for(aim)
            time.sleep(delay)
            child.send(signal.SIGINT)
            if pause is not None:
                time.sleep(pause)
                child.send(signal.SIGINT)
            code = child.wait()
            expect(code in (0, 130), f"exit code {code}: {child.text()[-400:]}")
            _check_what_is_left(run, child.text(), weights)


def _check_what_is_left(run: Path, text: str, weights: dict[str, Tensor]) -> None:
    returned = re.search(r"^returned (\w+); (.*)$", text, re.MULTILINE)
    if returned is not None:
        expect("handler True." in text, "the signal handler was not put back")
        _load(run)
    if returned is not None and returned[1] == "None":
        expect(equal_weights(_adapter(_load(run)), weights), "finished with other weights")
        return
    newest, skipped = newest_valid_checkpoint(run)
    expect(not skipped, f"a broken checkpoint was left: {skipped}")
    if returned is not None:
        stop = int(returned[1])
        expect(f"stopped at step {stop}" in returned[2], f"the result says {returned[2]}")
        expect(newest == run / f"checkpoint-{stop}", f"stopped at {stop}, newest is {newest}")
    if newest is not None:
        _load(newest)
    result = jobs.asked_train(run, resume=newest is not None)
    expect(equal_weights(_adapter(result.model), weights), "resumed to other weights")


def _load(folder: Path) -> PeftModel:
    """The saved adapter on a fresh base."""
    return PeftModel.from_pretrained(tiny_model(), folder)


def _adapter(model: Any) -> dict[str, Tensor]:
    named = model.named_parameters()
    return {name: p.detach().clone() for name, p in named if "lora_" in name}


# ---- 14: full disk --------------------------------------------------------------------------


def full_disk(trials: Trials) -> None:
    """Let a save fail at any of its writes: training goes on, nothing that was there is lost."""
    whole = tiny_trainer(trials.folder / "whole", max_steps=4)
    whole.train()
    weights = trained_weights(whole)
    for trial in trials:
        with trial:
            run = trial.folder / "run"
            trainer = tiny_trainer(run, max_steps=4, save_strategy="steps", save_steps=1)
            failing = _size_limit(trial) if trial.index % 2 else _failing_call(trial)
            real = trainer._write_checkpoint

            def write(chosen: Any, trainer: Any = trainer, real: Any = real, failing: Any = failing,
                      run: Path = run) -> None:  # fmt: skip
                if trainer.state.global_step != 3:
                    real(chosen)
                    return
                try:
                    with failing:
                        real(chosen)
                finally:
                    verify_checkpoint(run / "checkpoint-2")

            out = io.StringIO()
            with (
                mock.patch.object(trainer, "_write_checkpoint", write),
                contextlib.redirect_stdout(out),
            ):
                trainer.train()
            left = [path.name for path in checkpoints(run)]
            expect(left == ["checkpoint-2", "checkpoint-4"], f"left: {left}")
            expect(len(trainer.failed_saves) == 1, "the write did not fail")
            message = out.getvalue()
            expect(re.search(r"needs more than [\d.]+ MiB", message), f"no size: {message}")
            expect(re.search(r"[\d.]+ MiB are free", message), f"no free space: {message}")
            expect(not list(run.glob(".*")), "leftovers")
            expect(equal_weights(trained_weights(trainer), weights), "the weights differ")
            resumed = tiny_trainer(trial.folder / "resumed", max_steps=4)
            resumed.train(resume_from_checkpoint=str(run / "checkpoint-2"))
            expect(equal_weights(trained_weights(resumed), weights), "resumed to other weights")


def _size_limit(trial: Trial) -> Any:
    """Files beyond a size fail for real, in every writer; the adapter has some 20 KB."""
    size = int(10 ** trial.rng.uniform(0, 4.2))
    trial.tried = f"no file beyond {size} bytes"
    return files_of_at_most(size)


@contextlib.contextmanager
def _failing_call(trial: Trial) -> Iterator[None]:
    """The n-th call that writes, syncs or renames says that the disk is full."""
    left = trial.rng.randrange(25)
    trial.tried = f"write call {left + 1} says that the disk is full"

    def guarded(real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError(28, "No space left on device")
            return real(*args, **kwargs)

        return call

    places = (
        (Path, "write_text"), (state, "save_file"), (os, "fsync"), (Path, "rename"),
        (trainer_mixin, "save_run"), (sealed_folder, "seal"),
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        for owner, name in places:
            patch = mock.patch.object(owner, name, guarded(getattr(owner, name)))
            stack.enter_context(patch)
        yield


CHECKS = [
    Check(1, "kill -9 at a random moment, then resume", 100, kills, is_long=True),
    Check(7, "checkpoint damaged: found, named, the one before is used", 60, damage),
    Check(13, "Ctrl-C at a random moment, once and twice", 50, ctrl_c, is_long=True),
    Check(14, "full disk at any write of a save", 30, full_disk),
]
