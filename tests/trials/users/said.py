"""Checks 34, 36, 39: where a run prints, what it must not print, what it says it will take."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import pty
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from tests.trials.scorecard import Check, Trial, Trials, expect
from transformers import LlamaConfig, LlamaForCausalLM

from rmipo_lite import run
from rmipo_lite.checkpoints.sealed_folder import checkpoints
from rmipo_lite.planning.device import end_peak, start_peak
from rmipo_lite.training import rehearsal
from rmipo_lite.training.rehearsal import Plan
from rmipo_lite.training.trainer import RMiPOTrainer
from tests.kit import VOCAB, tiny_model, train_words, word_rows
from tests.trials.runs.children import changed_environment, fresh_command, start

_LIMIT_S = 120


# ---- 34: terminals --------------------------------------------------------------------------

_ESCAPE = "\x1b"
_PLACES: dict[str, dict[str, str | None]] = {
    "a pipe": {},
    "a terminal": {"TERM": "xterm-256color"},
    "a dumb terminal": {"TERM": "dumb"},
    "an ASCII pipe": {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"},
    "nowhere: every stream is closed": {},
}


def terminals(trials: Trials) -> None:
    """Run where standard output is a pipe, a terminal, a dumb one, ASCII, or closed."""
    for trial in trials:
        with trial:
            name = list(_PLACES)[trial.index]
            trial.tried = f"standard output is {name}"
            run = trial.folder / "run"
            code, text = _run_in(name, fresh_command(printing_run, str(run)))
            expect(code == 0, f"exit code {code}: {text[-400:]}")
            expect((run / "adapter_model.safetensors").is_file(), "no adapter was saved")
            expect("Traceback" not in text and "Error" not in text, f"it says: {text[-400:]}")
            if "closed" in name:
                continue
            expect("held out" in text and "Plan: 3 steps" in text, f"it says: {text[-400:]}")
            if name != "a terminal":
                expect(_ESCAPE not in text and "\r" not in text, "a bar where there is no terminal")
            else:
                expect(_ESCAPE in text, "no bar in a terminal")


def printing_run(folder: str) -> None:
    """A run whose data report holds what ASCII has not."""
    rows = [{**row, "prompt": row["prompt"], "näme": "ü"} for row in word_rows(16)]
    train_words(tiny_model(), Path(folder), rows, max_steps=3)


def _run_in(name: str, command: list[str]) -> tuple[int, str]:
    environment = changed_environment(_PLACES[name])
    if "closed" in name:
        command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command]
        return subprocess.run(
            command, env=environment, timeout=_LIMIT_S, check=False
        ).returncode, ""
    if "terminal" not in name:
        done = subprocess.run(
            command, env=environment, timeout=_LIMIT_S, check=False, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        return done.returncode, done.stdout.decode(errors="replace")
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command, env=environment, stdin=theirs, stdout=theirs, stderr=subprocess.STDOUT
    )
    os.close(theirs)
    text = _read_all(ours)
    # A terminal ends its lines so.
    return process.wait(_LIMIT_S), text.replace("\r\n", "\n")


def _read_all(handle: int) -> str:
    parts = []
    with contextlib.suppress(OSError):  # the other end of a terminal is gone
        while part := os.read(handle, 65536):
            parts.append(part)
    os.close(handle)
    return b"".join(parts).decode(errors="replace")


# ---- 36: secrets ----------------------------------------------------------------------------

_VARIABLES = ("HF_TOKEN", "WANDB_API_KEY", "MY_SECRET", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD")


def secrets(trials: Trials) -> None:
    """Secrets in the environment and in options: in no file and no line of a run."""
    for trial in trials:
        with trial:
            variable = _VARIABLES[trial.index % len(_VARIABLES)]
            letters = "abcdefghijklmnopqrstuvwxyz0123456789"
            secret = "".join(trial.rng.choice(letters) for _ in range(24))
            token = "hf_" + "".join(trial.rng.choice(letters) for _ in range(24))
            fails = trial.rng.random() < 0.3
            trial.tried = (
                f"${variable}, hub_token, run_name; the run {'fails' if fails else 'ends'}"
            )
            with mock.patch.dict(os.environ, {variable: secret}):
                text = _everything_said(trial.folder / "run", secret, token, fails)
                text += _said_by_the_command_line(secret, token)
            for hidden in (secret, token):
                expect(hidden not in text, "a secret was printed")
                for path in trial.folder.rglob("*"):
                    if path.is_file():
                        found = hidden.encode() in path.read_bytes()
                        expect(not found, f"a secret is in {path.name}")


def _everything_said(folder: Path, secret: str, token: str, fails: bool) -> str:
    """What a run prints and logs; one that fails has a secret in the option it fails over."""
    options: dict[str, Any] = {f"no_such_option_{token}": 1} if fails else {}
    with _listening() as sink:
        try:
            result = train_words(
                tiny_model(), folder, max_steps=3, save_steps=1, logging_steps=1, hub_token=token,
                run_name=f"run of {secret}", save_pair_values=True, **options,
            )  # fmt: skip
        except TypeError:
            expect(fails, "the run failed")
        else:
            result.report(folder / "report.html")
            sink.write(repr(result) + result._repr_html_())
    return sink.getvalue()


def _said_by_the_command_line(secret: str, token: str) -> str:
    from rmipo_lite.cli.main import main

    with _listening() as sink:
        main(["train", f"./no-model-{secret}", f"./no-data-{token}.jsonl"])
        main(["info"])
    return sink.getvalue()


@contextlib.contextmanager
def _listening() -> Iterator[io.StringIO]:
    """Everything printed and logged inside the block."""
    sink = io.StringIO()
    handler = logging.StreamHandler(sink)
    loggers = [logging.getLogger(name) for name in ("", "transformers", "peft", "accelerate")]
    disabled = logging.root.manager.disable
    logging.disable(logging.NOTSET)
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            yield sink
    finally:
        logging.disable(disabled)
        for logger in loggers:
            logger.removeHandler(handler)


# ---- 39: the plan ---------------------------------------------------------------------------

_WITHIN = 0.15
_CPU = torch.device("cpu")
_ANSWER = "planned and taken: "
# What else the machine does meanwhile is not the plan's fault: both are CPU time of one thread.
_CLOCK = SimpleNamespace(perf_counter=time.process_time)


def plans(trials: Trials) -> None:
    """Time, memory and disk as planned, against what the run then took."""
    for trial in trials:
        with trial:
            shape = {
                "hidden_size": trial.rng.choice((128, 256)),
                "intermediate_size": trial.rng.choice((256, 640)),
                "num_hidden_layers": trial.rng.choice((2, 4)),
            }
            options = {
                "max_steps": 24,
                "save_steps": trial.rng.choice((8, 12)),
                "per_device_train_batch_size": trial.rng.choice((8, 16)),
            }
            trial.tried = f"{shape}, {options}"
            plan, taken = _planned_and_taken(trial, shape, options)
            errors = {name: plan[name] / taken[name] - 1 for name in taken}
            told = ", ".join(f"{name} {error:+.0%}" for name, error in errors.items())
            trial.tried += f": {told}"
            expect(all(abs(error) <= _WITHIN for error in errors.values()), f"off by {told}")


def _planned_and_taken(
    trial: Trial, shape: dict[str, Any], options: dict[str, Any]
) -> tuple[dict[str, float], dict[str, float]]:
    """The plan, and what the run took after it, in a child: memory here has a history."""
    output = trial.folder / "out"
    child = start(
        planned_run, str(trial.folder / "run"), trial.index, shape, options, output=output
    )
    expect(child.wait(seconds=600) == 0, f"the run failed: {child.text()[-400:]}")
    plan, taken = json.loads(child.text().rsplit(_ANSWER, 1)[1])
    return plan, taken


def planned_run(folder: str, index: int, shape: dict[str, Any], options: dict[str, Any]) -> None:
    """Train, watching; print what was planned and what was taken."""
    torch.manual_seed(index)
    config = LlamaConfig(
        vocab_size=VOCAB, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=512, bos_token_id=1, eos_token_id=2, **shape,
    )  # fmt: skip
    watch = _Watch()
    with (
        mock.patch.object(rehearsal, "time", _CLOCK),
        mock.patch.object(run, "plan_run", watch.plan),
        mock.patch.object(RMiPOTrainer, "train", watch.train()),
    ):
        rows = _rows_of_one_length(index)
        result = train_words(LlamaForCausalLM(config), Path(folder), rows, **options)
    # At its fullest the folder held one checkpoint more, the one that the last save replaced.
    replaced = options["max_steps"] > 2 * options["save_steps"]
    places = [Path(folder), *([checkpoints(folder)[-1]] if replaced else [])]
    files = [path for place in places for path in place.rglob("*") if path.is_file()]
    watch.taken["disk"] = sum(path.stat().st_size for path in files)
    plan = {name: getattr(result.plan, name) for name in watch.taken}
    sys.stdout.write(_ANSWER + json.dumps([plan, watch.taken]))
    sys.stdout.flush()


def _rows_of_one_length(seed: int) -> list[dict[str, str]]:
    """Memory is planned for the longest pairs, so every step is to hold such."""

    rng = random.Random(seed)

    def words(count: int) -> str:
        return " ".join(f"w{rng.randrange(3, VOCAB - 1)}" for _ in range(count))

    return [{"prompt": words(60), "chosen": words(50), "rejected": words(50)} for _ in range(200)]


class _Watch:
    """Measures a run from its plan to the end of its loop."""

    def __init__(self) -> None:
        self.taken: dict[str, float] = {}
        self._base = 0

    def plan(self, *args: Any) -> Plan:
        """Plan the run; its memory counts from before the plan's own measurement."""
        self._base = start_peak(_CPU) or 0
        return rehearsal.plan_run(*args)

    def train(self) -> Any:
        """A `train` that is timed."""
        real = RMiPOTrainer.train

        def timed(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            start_peak(_CPU)
            start = _CLOCK.perf_counter()
            output = real(trainer, *args, **kwargs)
            self.taken["seconds"] = _CLOCK.perf_counter() - start
            self.taken["memory"] = (end_peak(_CPU) or 0) - self._base
            return output

        return timed


CHECKS = [
    Check(34, "terminal, pipe, ASCII, closed streams", len(_PLACES), terminals, quick=0, least=3),
    Check(36, "secrets in no file and no line", 10, secrets, quick=1, least=2),
    Check(39, "time, memory and disk as planned, within 15 %", 10, plans, quick=0, least=2),
]
