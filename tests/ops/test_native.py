"""Calling the kernels, and what is said where they are missing."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from rmipo_lite.ops import library, native
from tests.conftest import ROOT


def test_missing_extension_warns_once_and_native_refuses(monkeypatch) -> None:
    missing = library.BackendStatus(False, None, None, "no C++ compiler")
    monkeypatch.setattr(library, "_statuses", {"cpu": missing})
    monkeypatch.setattr(native, "_warned", set())
    cpu = torch.device("cpu")
    with pytest.warns(UserWarning, match="plain PyTorch does the work on cpu.*no C\\+\\+ compiler"):
        assert not native.use_native("auto", cpu)
    assert not native.use_native("auto", cpu)  # a second warning would be an error here
    with pytest.raises(RuntimeError, match="for cpu is missing: no C\\+\\+ compiler"):
        native.use_native("native", cpu)


def test_a_forked_child_does_not_hang() -> None:
    """Its parent's thread pool is gone: the child works in one thread."""
    code = (
        "import os, torch\n"
        "from rmipo_lite.ops import linear_logps\n"
        "torch.set_num_threads(2)\n"
        "a = torch.randn(600, 64), torch.randn(3000, 64), torch.zeros(600, dtype=torch.int64)\n"
        "want = linear_logps(*a, impl='native').sum()\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    os._exit(0 if torch.isclose(linear_logps(*a, impl='native').sum(), want) else 1)\n"
        "assert os.waitpid(pid, 0)[1] == 0\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, check=True, timeout=60)
