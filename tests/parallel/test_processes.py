"""A run on two and three processes is the run of one: numbers, files, and what goes wrong."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from rmipo_lite.checkpoints.sealed_folder import verify_checkpoint
from rmipo_lite.demo import MODEL, load_rows
from tests.conftest import ROOT
from tests.parallel import worker
from tests.parallel.launched import difference, launched, outcome_of

pytestmark = pytest.mark.slow

_GUARD_S = 120  # a hang is a failure
_ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
_OF_THREE = ("plain", "fewer_pairs_than_processes", "not_finite")
# Names whose numbers are those of one process; the others have tests of their own.
SAME = [name for name in worker.SCENARIOS if name not in ("out_of_memory_for_ever", "resumed")]


def test_a_shared_run_is_that_of_one_process(tmp_path: Path) -> None:
    """One test, so that the processes are begun once: every scenario by one, two, some by three."""
    worker.run(tmp_path / "1", [*SAME, "resumed"])
    launched(2, tmp_path / "2", list(worker.SCENARIOS))
    launched(3, tmp_path / "3", list(_OF_THREE))
    problems = {}
    for processes, names in ((2, SAME), (3, _OF_THREE)):
        for name in names:
            of_each = [_of(tmp_path, processes, name, rank) for rank in range(processes)]
            problems[processes, name] = difference(_of(tmp_path, 1, name), of_each, 1e-5)
    assert {where: problem for where, problem in problems.items() if problem} == {}
    _shows_what_it_was_meant_to(tmp_path)
    _wrote_every_pair_once(tmp_path)
    _wrote_the_files_of_one_process(tmp_path)
    _goes_on_with_another_number(tmp_path)


def _of(folder: Path, processes: int, name: str, rank: int = 0) -> dict[str, Any]:
    return outcome_of(folder / str(processes) / name, rank)


def _shows_what_it_was_meant_to(folder: Path) -> None:
    assert {pair["row"] for pair in _of(folder, 2, "not_finite")["dropped"]} == {3, 17}
    assert len(_of(folder, 2, "full_disk", 1)["failed"]) == 1
    assert _of(folder, 2, "stopped_by_one")["log"][-1]["step"] == 4
    assert _of(folder, 2, "unused_weight")["weights"]["unused"].tolist() == [1.0] * 3
    first, last = (_of(folder, 2, "out_of_memory", rank) for rank in (0, 1))
    assert last["budget"] < first["budget"]
    assert last["said"].startswith("process 1: Out of memory")
    first, last = (_of(folder, 2, "out_of_memory_for_ever", rank) for rank in (0, 1))
    assert last["error"].startswith("OutOfMemoryError: out of memory with one pair alone (row ")
    assert first["error"].startswith("OtherProcessError: process 1 could not go on")


def _wrote_every_pair_once(folder: Path) -> None:
    def lines(processes: int) -> list[tuple[int, int]]:
        text = (folder / str(processes) / "plain" / "run" / "pair_values.jsonl").read_text()
        return [(line["step"], line["row"]) for line in map(json.loads, text.splitlines())]

    assert sorted(lines(2)) == sorted(lines(3)) == sorted(lines(1))
    assert len(set(lines(2))) == len(lines(2)) == 120


def _wrote_the_files_of_one_process(folder: Path) -> None:
    def files(processes: int) -> list[str]:
        checkpoint = folder / str(processes) / "plain" / "run" / "checkpoint-18"
        verify_checkpoint(checkpoint)
        return sorted(path.name for path in checkpoint.iterdir())

    assert files(2) == files(1)


def _goes_on_with_another_number(folder: Path) -> None:
    whole, again = _of(folder, 2, "plain"), _of(folder, 2, "resumed")
    assert all(torch.equal(again["weights"][name], w) for name, w in whole["weights"].items())
    for processes in (1, 2):  # two processes' by one, one's by two
        swapped = folder / f"resumed by {processes}"
        swapped.mkdir()
        (swapped / "plain").symlink_to(folder / str(3 - processes) / "plain")
        if processes == 1:
            worker.run(swapped, ["resumed"])
        else:
            launched(2, swapped, ["resumed"])
        weights = outcome_of(swapped / "resumed")["weights"]
        for name, weight in whole["weights"].items():
            torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-5)


def _command(tmp_path: Path, *more: str) -> list[str]:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps(row) for row in load_rows()[:300]), encoding="utf-8")
    return [
        sys.executable, "-m", "rmipo_lite.cli.main", "train", str(MODEL), str(rows), "--use_cpu",
        "True", "--learning_rate", "1e-3", "--output_dir", str(tmp_path / "run"), *more,
    ]  # fmt: skip


def test_the_command_says_everything_once(tmp_path: Path) -> None:
    options = ("--max_steps", "6", "--report", str(tmp_path / "run.html"))
    done = subprocess.run(
        [*_command(tmp_path, *options), "--num_processes", "2"], env=_ENV, cwd=tmp_path,
        capture_output=True, text=True, timeout=_GUARD_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if len(line) > 20]
    assert "2 processes share the 32 pairs of every step" in lines
    assert sum(line.startswith("TrainResult(") for line in lines) == 1
    told = [line for line in lines if line.startswith(("Plan:", "step 6:", "Loading", "source"))]
    assert len(told) == len(set(told)) >= 3
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "run.html").is_file()
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["run"]


def test_ctrl_c_stops_all_at_the_same_step(tmp_path: Path) -> None:
    options = ("--max_steps", "4000", "--save_steps", "4000", "--accelerate_config", "fsdp2")
    command = [*_command(tmp_path, *options), "--num_processes", "2"]
    with subprocess.Popen(
        command, env=_ENV, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("step ") and "left" in line:
                    break
            began = time.monotonic()
            process.send_signal(signal.SIGINT)
            rest = process.stdout.read()
            assert process.wait(timeout=_GUARD_S) != 0
            assert time.monotonic() - began < _GUARD_S
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert rest.count("Stopping when this step") == 1
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    verify_checkpoint(checkpoint)
