"""Checks 34, 36: where a run prints, and what it must not print."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import pty
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from tests.kit import tiny_model, train_words, word_rows
from tests.trials.runs.children import changed_environment, fresh_command
from tests.trials.scorecard import Check, Trials, expect

_LIMIT_S = 600  # of seconds, to end a hang


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


CHECKS = [
    Check(
        34, "terminal, pipe, ASCII, closed streams", len(_PLACES), terminals, least=3, is_long=True
    ),
    Check(36, "secrets in no file and no line", 10, secrets, least=2),
]
