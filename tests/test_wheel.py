"""What people install: the product and nothing else, and it works from there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.conftest import ROOT

MOST_LINES = 32_500  # of Python
ROOMS = {
    "adapters", "checkpoints", "cli", "comparing", "data", "demo", "export", "inspection",
    "judging", "methods", "model", "ops", "options", "output", "parallel", "planning", "results",
    "selftest", "step", "system", "tokens", "training", "watch",
}  # fmt: skip
_SOURCES = (
    "rmipo_lite",
    "csrc",
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
)

# With what the wheel brings along: model, tokenizer, pairs.
_TRAIN = """
import rmipo_lite
from rmipo_lite.demo import MODEL, load_rows

rmipo_lite.train(str(MODEL), load_rows()[:64], max_steps=1, learning_rate=1e-3, use_cpu=True)
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources, so that nothing lies in the tree afterwards."""
    copy, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    left_out = shutil.ignore_patterns("__pycache__", "*.so", "*.sha256", "*.pyc")
    for name in _SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=left_out)
        else:
            shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    _run([*command, "-w", str(out), str(copy)])
    return next(out.glob("rmipo_lite-*.whl"))


def _run(command: Sequence[str], **more: object) -> str:
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=600,
        **more,  # type: ignore[call-overload]
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return str(done.stdout)


def test_the_wheel_holds_the_product_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith("rmipo_lite/")]
        python = [name for name in names if name.endswith(".py")]
        lines = sum(archive.read(name).count(b"\n") for name in python)
    assert {name.split("/")[1] for name in python if name.count("/") > 1} == ROOMS
    assert lines <= MOST_LINES
    for part in ("trial", "bench", "make_model", "make_demo_model", "test_"):
        assert [name for name in names if part in name] == []
    assert "rmipo_lite/csrc/pair_math.h" in names  # for where kernels are compiled at first use
    assert "rmipo_lite/demo/assets/tiny-llama/model.safetensors" in names


def test_it_works_in_a_fresh_environment(wheel: Path, tmp_path: Path) -> None:
    """Dependencies are this environment's, seen from a new one; the package is the wheel's."""
    venv = tmp_path / "venv"
    _run([sys.executable, "-m", "venv", str(venv)])
    python = venv / "bin" / "python"
    site = Path(
        _run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip()
    )
    below = sysconfig.get_path("purelib")
    (site / "below.pth").write_text(f"import site; site.addsitedir({below!r})\n", encoding="utf-8")
    _run([str(python), "-m", "pip", "install", "-q", "--no-deps", str(wheel)])
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env |= {"RMIPO_LITE_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    place = {"cwd": folder, "env": env}
    where = _run([str(python), "-c", "import rmipo_lite; print(rmipo_lite.__file__)"], **place)
    assert Path(where.strip()).is_relative_to(venv)
    command = str(venv / "bin" / "rmipo-lite")
    assert "rmipo_lite" in _run([command, "info"], **place)
    _run([str(python), "-c", _TRAIN], **place)
