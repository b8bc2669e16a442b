"""What one process makes for all takes as long as it takes, and its error reaches everybody."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from rmipo_lite.parallel.once import once_a_machine
from tests.conftest import ROOT

_SCRIPT = """
import sys, time
from datetime import timedelta
from accelerate import PartialState
state = PartialState(cpu=True, timeout=timedelta(seconds=2))
from rmipo_lite.parallel.once import once_a_machine

def slow():
    assert state.process_index == 0, "made twice"
    time.sleep(5)
    return {"made": [1, 2]}

def wrong():
    raise ValueError("row 3: no prompt")

found = once_a_machine(slow)
try:
    once_a_machine(wrong)
except ValueError as error:
    print(f"process {state.process_index}: {found} {error}\\n", end="", flush=True)
"""


def test_one_process_just_makes_it() -> None:
    assert once_a_machine(lambda: 3) == 3


@pytest.mark.slow
def test_the_others_wait_longer_than_a_collective_may(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT, encoding="utf-8")
    run = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [*run, str(script)], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = {"process 0: {'made': [1, 2]} row 3: no prompt"}
    assert {line for line in done.stdout.splitlines() if line} == said | {
        "process 1: {'made': [1, 2]} row 3: no prompt"
    }
    assert not list(tmp_path.glob("rmipo-lite-*")), tempfile.gettempdir()
