"""The simulation of other systems refuses what they refuse; in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

CODE = """
import os, sys
from tests import elsewhere
sys.meta_path.insert(0, elsewhere.Finder())
from rmipo_lite.system import files, memory, processes
tried = {
    "fork": lambda: processes.os.fork,
    "resource": lambda: memory.__builtins__["__import__"]("resource"),
    "affinity": lambda: processes.os.sched_getaffinity,
    "platform": lambda: 1 / (files.sys.platform == os.environ["SYSTEM"]),
    "open file": lambda: guarded(sys.argv[1], sys.argv[1] + "2"),
    "closed file": lambda: (held.close(), guarded(sys.argv[1], sys.argv[1] + "2")),
}
guarded = elsewhere._guarded(os.replace, "replace")
held = open(sys.argv[1], "w", encoding="utf-8")
for name, call in tried.items():
    try:
        call()
        print(name, "ok")
    except Exception as error:
        print(name, type(error).__name__)
"""


@pytest.mark.parametrize(
    ("system", "refused"),
    [
        ("win32", {"fork": "AttributeError", "resource": "ModuleNotFoundError"}),
        ("darwin", {"fork": "ok", "resource": "ok"}),
    ],
)
def test_what_a_system_lacks_is_refused(
    system: str, refused: dict[str, str], tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path / "file")], cwd=ROOT, capture_output=True,
        text=True, check=True, env=os.environ | {"SYSTEM": system, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    want = refused | {
        "affinity": "AttributeError", "platform": "ok",
        "open file": "PermissionError", "closed file": "ok",
    }  # fmt: skip
    assert dict(line.rsplit(" ", 1) for line in done.stdout.splitlines()) == want
