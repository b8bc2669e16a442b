"""The script for a GPU: its order and limits with a stand-in for Python, its lines rehearsed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks import gpu_machine, records
from rmipo_lite.ops import library
from tests.conftest import ROOT

SCRIPT = ROOT / "benchmarks" / "gpu_check.sh"
# Notes what it was asked for; the build and the tests may fail, steps may write rows, and each of
# the four sanitizers waits until all of them run.
PYTHON = """#!/bin/sh
cd "$FOLDER"
printf '%s\\n' "$(echo "$*" | tr '\\n' ' ')" >>log
case "$*" in
  *library.status*) echo "no compiler"; exit "${BUILD:-0}" ;;
  "-m pytest"*) exit "${TESTS:-0}" ;;
  *"--only 41") echo "   addresses   not run: no NVIDIA GPU" ;;
  *"--part step"*) printf '%s' "$ROWS" >gpu.csv ;;
  *"--only 42 --trial"*)
    touch "running$6"
    [ "$6" = "$REPORT" ] && exit 1
    for _ in $(seq 50); do [ "$(ls running* | wc -l)" = 4 ] && exit 0; sleep 0.05; done
    echo alone >>log; exit 1 ;;
esac
"""


def check(folder: Path, *words: str, **environment: str) -> tuple[int, list[str], list[str]]:
    """The script's exit code and summary, and what it asked Python for."""
    stand_in = folder / "python"
    stand_in.write_text(PYTHON)
    stand_in.chmod(0o755)
    done = subprocess.run(
        ["bash", SCRIPT, folder, *words], capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "PYTHON": str(stand_in), "FOLDER": str(folder), **environment},
    )  # fmt: skip
    asked = (folder / "log").read_text().splitlines()[1:]  # past its version
    return done.returncode, (folder / "summary.txt").read_text().splitlines(), asked


def test_the_first_call_builds_tests_and_measures_the_head(tmp_path: Path) -> None:
    code, summary, asked = check(tmp_path, "first")
    assert code == 0
    names = ["machine", "build for cuda", "tests on cuda", "the head", "whole steps, a tiny model"]
    assert [re.split("  +", line)[0] for line in summary] == names
    assert all(line.endswith(" ok") for line in summary)
    assert "-W default" in asked[2]
    assert asked[2].endswith("tests/step/test_pair_step.py ")


def test_without_kernels_nothing_is_measured(tmp_path: Path) -> None:
    for call, steps in (("first", 2), ("second", 1)):
        (tmp_path / call).mkdir()
        code, summary, asked = check(tmp_path / call, call, BUILD="1")
        assert code == 1
        assert len(asked) == steps
        assert summary[-2].endswith("FAILED (1)")
        assert summary[-1].startswith("no kernels for cuda: build.txt says why")
        assert "no compiler" in (tmp_path / call / "build.txt").read_text()


def test_a_step_that_fails_stops_none_after_it(tmp_path: Path) -> None:
    code, summary, asked = check(tmp_path, "first", TESTS="3")
    assert code == 1
    (failed,) = [line for line in summary if not line.endswith(" ok")]
    assert re.fullmatch(r"tests on cuda +\d+ s  FAILED \(3\)", failed)
    assert "--part step --quick" in asked[-1]


def test_the_sanitizers_are_last_and_side_by_side(tmp_path: Path) -> None:
    code, summary, asked = check(tmp_path, "second")
    assert code == 0, summary
    tools = [f"-m tests.trials --only 42 --trial {tool} " for tool in range(4)]
    assert sorted(asked[-4:]) == tools
    found = re.search(r"--part step --seconds (\d+)", asked[-5])
    assert found
    assert 200 < int(found[1]) < 450
    assert summary[1].endswith("s  not run: no NVIDIA GPU")


def test_whole_steps_leave_time_for_what_is_after_them(tmp_path: Path) -> None:
    _, _, asked = check(tmp_path, "second", SECONDS="300")
    found = re.search(r"--part step --seconds (\d+)", asked[-5])
    assert found
    assert 100 <= int(found[1]) <= 120  # of the 260 that are left


def test_a_call_ends_when_its_time_does(tmp_path: Path) -> None:
    code, summary, asked = check(tmp_path, "first", SECONDS="184")
    assert code == 1
    assert asked == []
    assert summary[0].endswith(" s)")


def test_a_report_of_one_sanitizer_fails_the_call(tmp_path: Path) -> None:
    code, summary, _ = check(tmp_path, "second", REPORT="1")
    assert code == 1
    assert re.fullmatch(r"scorecard 42 +\d+ s  FAILED \(1\)", summary[-1])


def test_the_summary_says_which_steps_were_packed(tmp_path: Path) -> None:
    row = 'gpu step,{},"{}, 4096 tokens",,{},s,0.1,0.1,0.1\n'
    rows = [
        row.format("ours", "8B 2/3/2, packed", "time"),
        row.format("ours simpo", "8B 2/3/2, a card of 8 GB, padded", "time"),
        row.format("ours", "8B 2/3/2, packed", "pairs per second"),
        row.format("trl SimPO", "8B 2/3/2, packed", "time"),
        'gpu step,ours,"8B 2/3/2, a card of 8 GB",,time,s,absent: no time left,,\n',
    ]
    _, summary, _ = check(tmp_path, "second", ROWS="".join(rows))
    assert [line for line in summary if line.startswith(" ")] == [
        '  ours,"8B 2/3/2, packed, 4096 tokens"',
        '  ours simpo,"8B 2/3/2, a card of 8 GB, padded, 4096 tokens"',
    ]


@pytest.mark.parametrize("words", [[], ["third"], ["first", "--rehearsal"]])
def test_what_it_does_not_know_it_says(tmp_path: Path, words: list[str]) -> None:
    done = subprocess.run(
        ["bash", SCRIPT, tmp_path / "out", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "first|second" in done.stderr


def test_the_tests_that_a_gpu_runs_are_there() -> None:
    """Some lines of the script run on a card alone, where a wrong path would cost its time."""
    named = re.findall(r"tests/\w+/\w+\.py", SCRIPT.read_text())
    assert len(named) >= 4
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_the_wheels_are_those_that_the_project_asks_for() -> None:
    lines = (ROOT / "benchmarks" / "gpu_wheels.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["bench"]]
    asked = {canonicalize_name(r.name): r.specifier for r in map(Requirement, wanted)}
    met = {name for name, version in pinned.items() if version in asked.get(name, ())}
    assert met == set(pinned) - {"dill", "multiprocess"}  # which datasets asks for
    assert {"bitsandbytes", "datasets", "peft", "trl", "liger-kernel"} <= met


def test_what_a_machine_lacks_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    unmet = gpu_machine.lacking(["pytest>=1", "torch>=999", "no-such-package", "pip"])
    assert [line.split(": ")[0] for line in unmet] == ["torch>=999", "no-such-package"]
    assert unmet[1].endswith(": absent")
    assert f"pytest {pytest.__version__}" in capsys.readouterr().out


@pytest.mark.measured
@pytest.mark.slow
@pytest.mark.parametrize("call", ["first", "second"])
def test_everything_for_a_gpu_is_rehearsed_without_one(tmp_path: Path, call: str) -> None:
    """Time on a card is scarce: the script must be right the first time."""
    done = subprocess.run(
        ["bash", SCRIPT, tmp_path, call, "--rehearse"], capture_output=True, text=True,
        timeout=1800, check=False, env={**os.environ, "PYTHON": sys.executable},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    summary = (tmp_path / "summary.txt").read_text().splitlines()
    assert len(summary) >= 5
    assert "FAILED" not in done.stdout
    rows = records.read(tmp_path / "quick" / "gpu.csv")
    assert {row.op for row in rows} == {"gpu", "gpu step"}
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) <= 8


@pytest.mark.slow
def test_a_rehearsal_without_kernels_fails_with_the_reason(tmp_path: Path) -> None:
    if library.status("cpu").kind == "prebuilt":
        pytest.skip("the kernels lie beside the package here")
    done = subprocess.run(
        ["bash", SCRIPT, tmp_path, "first", "--rehearse"], capture_output=True, text=True,
        timeout=120, check=False,
        env={**os.environ, "PYTHON": sys.executable, "RMIPO_LITE_CACHE": "/dev/null/cache"},
    )  # fmt: skip
    assert done.returncode == 1
    assert "Not a directory" in (tmp_path / "build.txt").read_text()
    assert not (tmp_path / "tests.txt").exists()
