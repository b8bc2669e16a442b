"""Jobs in new processes, which may be killed, hang or lack what this one has."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

HANG_S = 600.0  # no job takes a tenth of it, beside whatever else the machine does


def run_fresh(
    job: Callable[..., None],
    *args: Any,
    env: Mapping[str, str | None] | None = None,
    seconds: float = HANG_S,
    kill_after: str | None = None,
) -> tuple[int, str]:
    """Exit code and output of `job(*args)` in a new interpreter; arguments go as JSON.

    Args:
        job: a function at the top of a module.
        *args: its arguments, JSON-like.
        env: changes of the environment; None removes a variable.
        seconds: after which the job and its own children are killed.
        kill_after: a line; when the job has printed it, it is killed.

    Raises:
        TimeoutError: it hung.
    """
    child = subprocess.Popen(
        fresh_command(job, *args), env=changed_environment(env or {}), text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        errors="replace", start_new_session=True,
    )  # fmt: skip
    assert child.stdout is not None
    hung = threading.Event()

    def end() -> None:
        with contextlib.suppress(ProcessLookupError):
            # All of its group: a hung worker outlives a parent that is killed alone.
            os.killpg(child.pid, signal.SIGKILL)
            hung.set()

    timer = threading.Timer(seconds, end)
    timer.start()
    text = ""
    with child:
        for line in child.stdout:
            text += line
            if line.rstrip("\n") == kill_after:
                child.kill()
    timer.cancel()
    if hung.is_set():
        raise TimeoutError(f"hung for more than {seconds:g} s: {text[-300:]}")
    return child.returncode, text


def fresh_command(job: Callable[..., None], *args: Any) -> list[str]:
    """The command that runs `job(*args)` in a new interpreter."""
    code = f"import json; from {job.__module__} import {job.__name__} as job; job(*json.loads("
    return [sys.executable, "-c", f"{code}{json.dumps(json.dumps(args))}))"]


def changed_environment(changes: Mapping[str, str | None]) -> dict[str, str]:
    """This process's environment with changes, and with this package importable."""
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    merged = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **changes}
    return {name: value for name, value in merged.items() if value is not None}
