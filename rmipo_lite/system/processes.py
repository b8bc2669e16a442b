"""Processes: how many cores, who lives, ending them, and what can be forked."""

import contextlib
import importlib
import multiprocessing
import os
import signal
import sys

import psutil

# Whether a worker forked after a computation works; macOS' own libraries don't survive it.
CAN_FORK = sys.platform == "linux"
# Exit code of a process of multiprocessing that was killed.
if sys.platform == "win32":
    KILLED = -signal.SIGTERM
else:
    KILLED = -signal.SIGKILL


def cores() -> int:
    """Cores that this process may use, where the system says so, else those there are."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def is_running(pid: int) -> bool:
    """Whether there is a process of this id, whoever's it is."""
    # Not os.kill(pid, 0): on Windows 0 is Ctrl-C.
    return pid < 2**31 and bool(psutil.pid_exists(pid))


def kill_with_children(pid: int) -> None:
    """End a process and those it began, at once; nothing where it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for process in (*parent.children(recursive=True), parent):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def process_context() -> str:
    """How multiprocessing begins a process: from a server where there can be one."""
    return "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


def can_rewrite_lines() -> bool:
    """Whether the terminal, where there is one, moves its cursor; Windows' do, and set no TERM."""
    return os.environ.get("TERM", "console" if sys.platform == "win32" else "") not in ("", "dumb")


def edit_typed_lines() -> None:
    """Let `input` edit a line and go back to earlier ones; Windows' console does it by itself."""
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")
