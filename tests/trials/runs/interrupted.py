"""Check 48: processes that share a run are interrupted or killed: all end, all files are whole."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from rmipo_lite.checkpoints.sealed_folder import newest_valid_checkpoint, verify_checkpoint
from rmipo_lite.demo import MODEL, load_rows
from tests.conftest import ROOT
from tests.trials.scorecard import Check, Trials, expect

_GUARD_S = 60  # from the signal on; a hang is a loss
_HOW = ("once", "twice", "terminated", "a process killed")
_LAYOUTS = ("multi_gpu", "fsdp2")


@dataclass
class _Run:
    """A run of two processes, in a session of its own."""

    process: subprocess.Popen[str]
    said: list[str]

    def until_a_step(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line)
            if line.startswith("step ") and "left" in line:
                return
        raise AssertionError(f"it ended before a step: {''.join(self.said[-20:])}")

    def workers(self) -> list[psutil.Process]:
        found = psutil.Process(self.process.pid).children(recursive=True)
        return [one for one in found if "RANK" in one.environ() and one.is_running()]

    def end(self) -> int:
        rest, _ = self.process.communicate(timeout=_GUARD_S)
        self.said += rest.splitlines(keepends=True)
        return self.process.returncode


@contextlib.contextmanager
def _run(folder: Path, layout: str) -> Iterator[_Run]:
    rows = folder / "rows.jsonl"
    rows.write_text("\n".join(json.dumps(row) for row in load_rows()[:200]), encoding="utf-8")
    command = [
        sys.executable, "-m", "rmipo_lite.cli.main", "train", str(MODEL), str(rows), "--use_cpu",
        "True", "--learning_rate", "1e-3", "--output_dir", str(folder / "run"), "--max_steps",
        "4000", "--save_steps", "2", "--eval_strategy", "steps", "--eval_steps", "5",
        "--eval_completions", "0", "--num_processes", "2", "--accelerate_config", layout,
    ]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, env=env, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        known: list[psutil.Process] = []
        run = _Run(process, [])
        try:
            run.until_a_step()
            known = run.workers()
            yield run
            left = [one.pid for one in known if one.is_running()]
            expect(not left, f"processes {left} are still there")
        finally:
            for one in known:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _disturb(run: _Run, how: str, rng: random.Random) -> None:
    time.sleep(rng.uniform(0.0, 1.5))  # a step, a save or an evaluation
    if how == "a process killed":
        rng.choice(run.workers()).kill()
        return
    run.process.send_signal(signal.SIGTERM if how == "terminated" else signal.SIGINT)
    if how == "twice":
        time.sleep(rng.uniform(0.1, 0.6))
        run.process.send_signal(signal.SIGINT)


def ends_whole(trials: Trials) -> None:
    """Whatever ends it, no process stays and the newest checkpoint verifies."""
    for trial in trials:
        how = _HOW[trial.index % len(_HOW)]
        layout = _LAYOUTS[trial.index // len(_HOW) % len(_LAYOUTS)]
        with trial:
            trial.tried = f"{layout}, {how}"
            with _run(trial.folder, layout) as run:
                _disturb(run, how, trial.rng)
                code = run.end()
            told = "".join(run.said[-12:])
            expect(code != 0, "it says that all went well")
            found, _ = newest_valid_checkpoint(trial.folder / "run")
            expect(found is not None, f"no checkpoint: {told}")
            for folder in (trial.folder / "run").glob("checkpoint-*"):
                verify_checkpoint(folder)
            if how in ("once", "terminated"):
                assert found is not None
                step = found.name.removeprefix("checkpoint-")
                expect(f"stopped at step {step}, saved" in told, f"steps are lost: {told}")


CHECKS = [
    Check(48, "several processes, interrupted or killed, leave it whole", 16, ends_whole, least=2)
]  # fmt: skip
