"""What a machine may do to a run: kill it in the middle, have no compiler for its kernels."""

from __future__ import annotations

import json
import math
import random
import re
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from torch import Tensor
from transformers import TrainerCallback

from rmipo_lite.checkpoints.sealed_folder import newest_valid_checkpoint, read_manifest
from rmipo_lite.ops import status
from rmipo_lite.output.console import say
from rmipo_lite.selftest.check import Case, Check, expect
from rmipo_lite.selftest.parts import equal_weights, tiny_model, tiny_trainer, trained_weights
from rmipo_lite.selftest.processes import run_fresh

STEPS = 12  # of a run that is to be killed


# ---- 1: kill -9 -----------------------------------------------------------------------------


class Announce(TrainerCallback):
    """Says what has just been done, for a parent to aim at."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step is about to run."""
        say(f"begun {state.global_step + 1}.")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The update has been made; a save may follow."""
        say(f"stepped {state.global_step}.")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The checkpoint is in its place."""
        say(f"saved {state.global_step}.")


def saving_run(folder: str) -> None:
    """A run that saves after every step, to be killed."""
    saving_trainer(Path(folder), callbacks=[Announce()]).train()


def saving_trainer(folder: Path, **options: Any) -> Any:
    """The trainer of that run; five pairs, so that an epoch has a short last step."""
    return tiny_trainer(
        folder, count=5, max_steps=STEPS, save_strategy="steps", save_steps=1, save_total_limit=2,
        disable_dropout=False, model=tiny_model(attention_dropout=0.1), **options,
    )  # fmt: skip


def kills(folder: Path, seed: int) -> Iterator[Case]:
    """Kill a saving run at a random place; what is left resumes to the uninterrupted weights."""
    whole = saving_trainer(folder / "whole")
    whole.train()
    rng = random.Random(seed)
    for number, word in enumerate(("stepped", "saved")):  # while it saves, and between saves
        line = f"{word} {rng.randint(2, STEPS - 1)}."
        run = partial(_kill, folder / str(number), line, trained_weights(whole))
        yield f"kill -9 after '{line}'", run


def _kill(folder: Path, line: str, weights: dict[str, Tensor]) -> None:
    code, text = run_fresh(saving_run, str(folder), kill_after=line)
    expect_resumes(folder, code, text, weights)


def expect_resumes(run: Path, code: int, text: str, weights: dict[str, Tensor]) -> None:
    """Lose the trial unless the killed run kept what it had saved, and resumes to these weights."""
    expect(code in (-signal.SIGKILL, 0), f"the run ended by itself: {text[-300:]}")
    newest, skipped = newest_valid_checkpoint(run)
    expect(not skipped, f"a broken checkpoint was left: {skipped}")
    kept = 0 if newest is None else read_manifest(newest)["step"]
    saved = [int(number) for number in re.findall(r"^saved (\d+)\.$", text, re.MULTILINE)]
    expect(kept >= max(saved, default=0), f"{saved} were saved, the newest checkpoint has {kept}")
    leftovers = [path.name for path in run.glob(".*")]
    expect(not leftovers, f"leftovers: {leftovers}")
    resumed = saving_trainer(run)
    resumed.train(resume_from_checkpoint=None if newest is None else str(newest))
    expect(equal_weights(trained_weights(resumed), weights), "the weights differ")


# ---- 17: no compiler ------------------------------------------------------------------------


def no_compiler(folder: Path, _seed: int) -> Iterator[Case]:
    """A process that finds no kernels and nothing to build them with trains all the same."""
    yield "nothing on PATH, an empty cache", partial(_train_plainly, folder)


def _train_plainly(folder: Path) -> None:
    env = {"PATH": str(folder), "RMIPO_LITE_CACHE": str(folder / "cache"), "CXX": None}
    code, text = run_fresh(plain_run, str(folder), env=env)
    expect(code == 0, f"exit {code}: {text[-300:]}")
    told = json.loads(text.splitlines()[-1])
    expect(told["kind"] is None, f"kernels from somewhere: {told}")
    expect(len(told["losses"]) == 2, f"it did not train: {told}")
    expect(all(map(math.isfinite, told["losses"])), f"losses {told['losses']}")


def plain_run(folder: str) -> None:
    """In that process: two steps, then where the kernels came from and the losses, as JSON."""
    with mock.patch("rmipo_lite.ops.library._PACKAGE", Path(folder)):  # no kernels beside it
        trainer = tiny_trainer(Path(folder) / "run", max_steps=2)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        say(json.dumps({"kind": status("cpu").kind, "losses": losses}))


CHECKS = [
    Check(1, "kill -9 and resume, on this disk", kills),
    Check(17, "no compiler and no kernels: plain PyTorch trains", no_compiler),
]
