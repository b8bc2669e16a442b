"""What a machine may do to a run: kill it, have no compiler for its kernels, fork it."""

import json
import multiprocessing
import os
import random
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import TrainerCallback

from rmipo_lite.checkpoints.sealed_folder import newest_valid_checkpoint, read_manifest
from rmipo_lite.ops import linear_logps, status
from rmipo_lite.output.console import say
from rmipo_lite.selftest.check import Case, Check, expect
from rmipo_lite.selftest.parts import equal_weights, tiny_model, tiny_trainer, trained_weights
from rmipo_lite.selftest.processes import HANG_S, run_job
from rmipo_lite.system.processes import CAN_FORK, KILLED

STEPS = 12  # of a run that is to be killed


class _Announce(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        say(f"stepped {state.global_step}.")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        say(f"saved {state.global_step}.")


def saving_trainer(folder: Path, **options: Any) -> Any:
    """A trainer that saves after every step; five pairs, so that an epoch ends in a short step."""
    return tiny_trainer(
        folder, count=5, max_steps=STEPS, save_strategy="steps", save_steps=1, save_total_limit=2,
        disable_dropout=False, model=tiny_model(attention_dropout=0.1), **options,
    )  # fmt: skip


def saving_run(folder: str) -> None:
    """Its run, which says what it has done, to be killed."""
    saving_trainer(Path(folder), callbacks=[_Announce()]).train()


def kills(folder: Path, seed: int) -> Iterator[Case]:
    """Kill a run at a random step, in its save and behind it; it resumes to the same weights."""
    whole = saving_trainer(folder / "whole")
    whole.train()
    for word in ("stepped", "saved"):
        line = f"{word} {random.Random(seed).randint(2, STEPS - 1)}."
        kill = partial(_kill, folder / word, line, trained_weights(whole))
        yield f"kill -9 after '{line}'", kill


def _kill(run: Path, line: str, weights: dict[str, Tensor]) -> None:
    output = run.with_suffix(".out")
    code, text = run_job(saving_run, str(run), output=output, kill_after=line)
    expect_resumes(run, code, text, weights)


def expect_resumes(run: Path, code: int, text: str, weights: dict[str, Tensor]) -> None:
    """Lose the case unless the killed run kept what it had saved, and resumes to these weights."""
    expect(code in (KILLED, 0), f"the run ended by itself: {text[-300:]}")
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


def no_compiler(folder: Path, _seed: int) -> Iterator[Case]:
    """A process that finds no kernels and nothing to build them with trains all the same."""
    yield "nothing on PATH, an empty cache", partial(_train_plainly, folder)


def _train_plainly(folder: Path) -> None:
    code, text = run_job(plain_run, str(folder), output=folder / "out")
    expect(code == 0, f"exit {code}: {text[-300:]}")
    kind, losses = json.loads(text.splitlines()[-1])
    expect(kind is None, f"kernels from somewhere: {kind}")
    expect(len(losses) == 2 and all(0 < loss < 99 for loss in losses), f"losses {losses}")


def plain_run(folder: str) -> None:
    """In that process: two steps, then where the kernels came from and the losses, as JSON."""
    os.environ |= {"PATH": folder, "RMIPO_LITE_CACHE": f"{folder}/cache", "CXX": "g++"}
    with mock.patch("rmipo_lite.ops.library._PACKAGE", Path(folder)):  # no kernels beside it
        trainer = tiny_trainer(Path(folder) / "run", max_steps=2)
        trainer.train()
        log = trainer.state.log_history
        say(json.dumps([status("cpu").kind, [line["loss"] for line in log if "loss" in line]]))


def forked_workers(folder: Path, _seed: int) -> Iterator[Case]:
    """Workers forked after a forward pass must not wait for threads that only the parent has."""
    for kind in ("DataLoader", "fork"):
        yield kind, partial(expect_no_hang, kind, folder / kind)


def expect_no_hang(kind: str, output: Path, seconds: float = HANG_S) -> None:
    """Lose the case when the workers hang, or give other values than their parent."""
    code, text = run_job(parent_with_workers, kind, output=output, seconds=seconds)
    expect(code == 0, f"exit {code}: {text[-300:]}")
    expect(text.splitlines()[-1:] == ["same"], f"the workers' values differ: {text[-300:]}")


def parent_with_workers(kind: str) -> None:
    """In the parent: a forward with two threads, then workers that do it again."""
    torch.set_num_threads(2)
    want = _value()
    torch.randn(700, 700).matmul(torch.randn(700, 700))  # and BLAS's own threads
    got = _by_dataloader() if kind == "DataLoader" else _by_fork()
    same = all(abs(number - want) < 1e-3 * abs(want) for number in got) and bool(got)
    say("same" if same else f"{got}, not {want}")


def _value() -> Tensor:
    """The operator's sum on fixed inputs, large enough for torch and the kernels to use threads."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=generator) for n in (600, 3000))
    return linear_logps(hidden, weight, torch.zeros(600, dtype=torch.int64)).sum()


def _by_dataloader() -> list[float]:
    items: Any = range(4)
    loader = torch.utils.data.DataLoader(
        items, num_workers=2, collate_fn=lambda _: _value(), multiprocessing_context="fork"
    )
    return [float(value) for value in loader]


def _by_fork() -> list[float]:
    """No DataLoader in between, which would set the number of threads."""
    fork: Any = multiprocessing.get_context("fork")
    values = fork.SimpleQueue()
    process = fork.Process(target=lambda: values.put(float(_value())))
    process.start()
    process.join()
    return [] if values.empty() else [values.get()]


def no_fork() -> str | None:
    """Why nothing can be forked here."""
    return None if CAN_FORK else "this system's libraries don't survive a fork"


CHECKS = [
    Check(1, "kill -9 and resume, on this disk", kills),
    Check(17, "no compiler and no kernels: plain PyTorch trains", no_compiler),
    Check(19, "workers forked after a forward pass", forked_workers, no_fork),
]
