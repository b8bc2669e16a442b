"""Processes to kill, interrupt and starve: forked in milliseconds, or started from nothing.

A job is a function at the top of a module. `start` forks it from a server process that has imported
the package and computed nothing (a fork after OpenMP has run can hang, see check 19), so that a
hundred runs can be killed without a hundred imports. `fresh` starts a new interpreter, for what
happens at import or depends on the environment.
"""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any

import torch

_PRELOADED = ["rmipo_lite", "rmipo_lite.training.trainer", "rmipo_lite.run"]
_PATIENCE_S = 600.0  # no job takes a tenth of it, beside whatever else the machine does


class Child:
    """A running job; its output goes to a file."""

    def __init__(self, process: Any, output: Path) -> None:
        self._process = process
        self.output = output

    @property
    def pid(self) -> int:
        """Process id."""
        return int(self._process.pid)

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return bool(self._process.is_alive())

    def send(self, number: int) -> None:
        """Send a signal; nothing happens where it has ended."""
        if self.running:
            os.kill(self.pid, number)

    def wait(self, seconds: float = _PATIENCE_S) -> int:
        """The exit code; minus the signal's number where one ended it.

        Raises:
            TimeoutError: it still runs; it is killed.
        """
        self._process.join(seconds)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
            raise TimeoutError(f"a child hung for more than {seconds:g} s: {self.text()[-300:]}")
        return int(self._process.exitcode)

    def wait_for(self, words: str, seconds: float = _PATIENCE_S) -> bool:
        """Whether its output has come to hold these words; False where it ended without."""
        deadline = time.monotonic() + seconds
        while words not in self.text():
            if not self.running:
                return words in self.text()
            if time.monotonic() > deadline:
                raise TimeoutError(f"a child never said {words!r}: {self.text()[-300:]}")
            time.sleep(0.002)
        return True

    def text(self) -> str:
        """What it has printed so far."""
        try:
            return self.output.read_text(errors="replace")
        except FileNotFoundError:
            return ""


def start(job: Callable[..., None], *args: Any, output: Path) -> Child:
    """Fork a child that runs `job(*args)` and writes what it prints to `output`."""
    process = _forking().Process(target=_run, args=(str(output), job, args), daemon=True)
    process.start()
    return Child(process, output)


@functools.cache
def _forking() -> Any:
    """The context of the server that children are forked from, started at first use."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")  # from nothing, seconds each
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    with _no_stderr():  # what they would say there (imports, kills) belongs to no check
        resource_tracker.ensure_running()
        forkserver.ensure_running()
    return context


@contextlib.contextmanager
def _no_stderr() -> Iterator[None]:
    """Start processes that inherit no standard error."""
    kept, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(sink)


def _run(output: str, job: Callable[..., None], args: tuple[Any, ...]) -> None:
    sink = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    sys.stdout = open(1, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115 - lives as long as we
    sys.stderr = open(2, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)  # as in the parent: another number would round otherwise
    try:
        job(*args)
    except KeyboardInterrupt:
        sys.stdout.write("KeyboardInterrupt\n")
        os._exit(130)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def fresh(
    job: Callable[..., None],
    *args: Any,
    env: Mapping[str, str | None] | None = None,
    seconds: float = _PATIENCE_S,
    **options: Any,
) -> subprocess.CompletedProcess[str]:
    """Run `job(*args)` in a new interpreter and wait for its end; arguments go as JSON.

    Args:
        job: a function at the top of a module.
        *args: its arguments, JSON-like.
        env: changes of the environment; None removes a variable.
        seconds: the time limit.
        **options: of `subprocess.run`.

    Raises:
        subprocess.TimeoutExpired: it hung; it is killed.
    """
    return subprocess.run(
        fresh_command(job, *args),
        env=changed_environment(env or {}),
        timeout=seconds,
        check=False,
        **{"capture_output": True, "text": True, "stdin": subprocess.DEVNULL, **options},
    )


def fresh_command(job: Callable[..., None], *args: Any) -> list[str]:
    """The command that runs `job(*args)` in a new interpreter."""
    code = f"import json; from {job.__module__} import {job.__name__} as job; job(*json.loads("
    return [sys.executable, "-c", f"{code}{json.dumps(json.dumps(args))}))"]


def changed_environment(changes: Mapping[str, str | None]) -> dict[str, str]:
    """This process's environment with changes, and with package and trials importable."""
    root = str(Path(__file__).resolve().parents[3])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    merged: dict[str, str | None] = {
        **os.environ, "PYTHONPATH": os.pathsep.join(paths), **changes,
    }  # fmt: skip
    return {name: value for name, value in merged.items() if value is not None}
