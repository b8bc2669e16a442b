"""A question answered by a module in a process of its own: its memory and caches are nobody's."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from benchmarks import ROOT
from benchmarks.peers import Absent
from rmipo_lite.output.console import say

_WARNINGS = ("-W", "ignore", "-W", "always:rmipo_lite")  # not the peers', but ours
_OURS = ("rmipo_lite: ", "Packed batches are off")


def ask(
    module: str,
    question: object,
    what: str,
    limit_s: float,
    environment: Mapping[str, str] | None = None,
) -> Any:
    """What `python -m module QUESTION`, both in JSON, prints in its last line.

    What it says of our kernels, and that packed batches are off, is said here too.

    Raises:
        Absent: it answers a text: why it can't run here.
        RuntimeError: it failed at `what`; the last line of its error.
    """
    done = subprocess.run(
        [sys.executable, *_WARNINGS, "-m", module, json.dumps(question)],
        cwd=ROOT, env={**os.environ, **(environment or {})}, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=limit_s, check=False,
    )  # fmt: skip
    for line in (done.stderr + done.stdout).splitlines():
        if any(words in line for words in _OURS):
            say(line)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(f"{what}: {lines[-1]}")
    answer = json.loads(done.stdout.splitlines()[-1])
    if isinstance(answer, str):
        raise Absent(answer)
    return answer
