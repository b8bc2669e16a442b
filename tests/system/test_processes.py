"""Processes: who lives, and ending one with its children."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import psutil

from rmipo_lite.system import processes

PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""


def test_who_is_running() -> None:
    done = subprocess.Popen([sys.executable, "-c", ""])
    assert processes.is_running(os.getpid())
    assert processes.is_running(done.pid)
    done.wait()
    # The last one is what a folder's name may say.
    assert not any(processes.is_running(pid) for pid in (done.pid, 2**31, 10**30))


def test_the_children_end_with_their_parent() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    with parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        processes.kill_with_children(parent.pid)
        assert parent.wait(10) != 0
    deadline = time.monotonic() + 10
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the child lives on"
        time.sleep(0.01)
    processes.kill_with_children(parent.pid)  # nothing is left to end


def test_cores_are_counted_everywhere() -> None:
    assert 1 <= processes.cores() <= (os.cpu_count() or 1)
