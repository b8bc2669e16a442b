"""Jobs in processes of their own, which may be killed, may hang, and may lack what this one has.

They are forked from a server that has imported the package and computed nothing: the imports take
longer than the checks, and a fork after OpenMP has run can hang.
"""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rmipo_lite.system.processes import kill_with_children, process_context

HANG_S = 600.0  # no job takes a tenth of it, beside whatever else the machine does
_CONTEXT: Any = multiprocessing.get_context(process_context())


def start_server() -> None:
    """Let the server begin to import the package; this takes no import itself."""
    if process_context() == "forkserver":
        from multiprocessing import forkserver

        _CONTEXT.set_forkserver_preload(["rmipo_lite.selftest.survival"])
        forkserver.ensure_running()


def run_job(
    job: Callable[..., None],
    *args: Any,
    output: Path,
    kill_after: str = "",
    seconds: float = HANG_S,
) -> tuple[int, str]:
    """Exit code and output of `job(*args)`, which prints to a file and is killed after a line.

    Raises:
        TimeoutError: it hung for so many seconds; it and its children are killed.
    """
    start_server()
    process = _CONTEXT.Process(target=_run, args=(str(output), job, args))
    process.start()
    deadline = time.monotonic() + seconds
    try:
        while process.exitcode is None:
            process.join(0.002)
            if kill_after and kill_after in _text(output).splitlines():
                process.kill()
            if time.monotonic() > deadline:
                raise TimeoutError(f"hung for more than {seconds:g} s: {_text(output)[-300:]}")
    finally:
        if process.exitcode is None:  # it hung, or this process was interrupted
            kill_with_children(process.pid)  # the children may hang too
            process.join()
    return int(process.exitcode), _text(output)


def _text(output: Path) -> str:
    return output.read_text(encoding="utf-8", errors="replace") if output.exists() else ""


def _run(output: str, job: Callable[..., None], args: tuple[Any, ...]) -> None:
    sink = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    sys.stdout = open(1, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115 - lives as long as we
    sys.stderr = open(2, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115
    import torch

    torch.set_num_threads(1)  # as in the parent: another number would round otherwise
    job(*args)
