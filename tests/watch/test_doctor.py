"""The doctor on real runs of the demo's model, and what it keeps between runs."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import rmipo_lite
from rmipo_lite import demo
from rmipo_lite.config import RMiPOConfig
from rmipo_lite.data.report import DataReport
from rmipo_lite.demo.data import message_row, swapped
from rmipo_lite.demo.task import make_pairs
from rmipo_lite.training import evaluation
from rmipo_lite.watch import completions
from rmipo_lite.watch.doctor import Doctor


def _swap(rows: list[dict[str, Any]], share: float) -> list[dict[str, Any]]:
    """Rows of which a share has its sides swapped, drawn at random."""
    wrong = set(random.Random(0).sample(range(len(rows)), round(share * len(rows))))
    return [swapped(row) if i in wrong else row for i, row in enumerate(rows)]


def _wordy_preferred() -> list[dict[str, Any]]:
    """Right answers alone, the wordy one always chosen."""
    pairs = [pair for pair in make_pairs(1600) if pair.kind == "terse/wordy"]
    return [message_row(pair.question.text, pair.rejected, pair.chosen) for pair in pairs]


def _train(rows: list[dict[str, Any]], folder: Path, **options: Any) -> rmipo_lite.TrainResult:
    settings = {"max_steps": 30, "learning_rate": 1e-3, "logging_steps": 5, "sample_prompts": 0}
    return rmipo_lite.train(demo.MODEL, rows, output_dir=folder, **(settings | options))


@pytest.mark.slow
def test_a_healthy_run_is_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = _train(_swap(demo.easy_rows(), 0.15), tmp_path / "run")
    assert list(result.findings) == []
    said = capsys.readouterr().out
    assert "WARNING" not in said
    assert "Note" not in said
    assert "findings" not in repr(result)


@pytest.mark.slow
def test_a_run_that_runs_away(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pairs whose chosen side is always longer, at a rate far too high."""
    result = _train(
        _wordy_preferred(), tmp_path / "run", learning_rate=1e-2, eval_strategy="steps",
        eval_steps=15, length_balance="off", end_anchor=0.0, sft_weight=0.0,
    )  # fmt: skip
    assert {"chosen_longer", "chosen_collapsing", "length_runaway"} <= set(result.findings.names)
    said = capsys.readouterr().out
    assert said.count("the model's answers run away") == 1
    # Said while the run went on, and not when it was over.
    assert said.index("became less likely") < said.index("30 steps in")
    assert "findings: chosen_longer" in repr(result)
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    page = result.report(tmp_path / "run.html").read_text(encoding="utf-8")
    for text in (page, card, result._repr_html_(), str(result.findings)):
        assert "the chosen response is the longer one in 100%" in " ".join(text.split())


@pytest.mark.slow
def test_labels_swapped_and_nothing_learnt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = _train(_swap(demo.easy_rows(), 0.9), tmp_path / "run", learning_rate=0.0)
    steps = {finding.name: finding.steps for finding in result.findings}
    assert steps["swapped_labels"] == (0, 0)
    assert steps["learning_rate_low"] == (30, 30)
    # Where the wrong side is chosen its prompt speaks against it: gamma is at its maximum.
    assert set(steps) <= {"swapped_labels", "learning_rate_low", "gamma_pinned"}
    said = capsys.readouterr().out
    assert said.index("the rejected side likelier") < said.index("Plan:")


def test_an_answer_that_fails_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError("no generation here")

    monkeypatch.setattr(completions, "generate_ids", fail)
    result = _train(demo.load_rows()[:200], tmp_path / "run", max_steps=2)
    assert capsys.readouterr().out.count("no generation here") == 1
    assert f"eval_{completions.CLIPPED}" not in result.metrics
    assert "eval_loss" in result.metrics


def test_evaluations_answer_as_many_prompts_as_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []

    def count(model: Any, tokenizer: Any, pairs: Any, count: int, *rest: Any) -> dict[str, Any]:
        counts.append(count)
        return {}

    monkeypatch.setattr(evaluation, "completion_numbers", count)
    rows = demo.load_rows()[:200]
    _train(rows, tmp_path / "a", max_steps=1, eval_completions=5)
    _train(rows, tmp_path / "b", max_steps=1, eval_completions=0)
    assert counts == [5, 5]


# ---- without a run --------------------------------------------------------------------------


def _state(step: int, *history: dict[str, float], max_steps: int = 100) -> Any:
    return SimpleNamespace(global_step=step, max_steps=max_steps, log_history=list(history))


def _numbers(accuracy: float, chosen: float = -1.0) -> dict[str, float]:
    return {
        "eval_loss": 0.5, "eval_rewards/accuracies": accuracy, "eval_logps/chosen": chosen,
        "eval_logps/rejected": -2.0,
    }  # fmt: skip


@pytest.fixture
def doctor(tmp_path: Path) -> Doctor:
    doctor = Doctor(RMiPOConfig(str(tmp_path), use_cpu=True), pairs=50)
    doctor.held_out_values.errors = dict.fromkeys(_numbers(0.5), 0.001)
    return doctor


def test_a_finding_is_said_once_and_keeps_its_steps(
    doctor: Doctor, capsys: pytest.CaptureFixture[str]
) -> None:
    doctor.on_evaluate(None, _state(0), None, metrics=_numbers(0.7))
    doctor.on_train_begin(None, _state(0), None)
    history = []
    for step in (10, 20, 30):
        history.append({"step": step, **_numbers(0.7, chosen=-1.0 - step / 10)})
        doctor.on_evaluate(None, _state(step, *history), None, metrics=history[-1])
    (finding,) = doctor.findings
    assert finding.steps == (10, 30)
    assert "by 3.0 nats" in finding.text  # the newest number
    assert capsys.readouterr().out.count("became less likely, by 1.0 nats") == 1


def test_a_second_run_begins_anew(doctor: Doctor) -> None:
    """What is measured between two runs is what the second one starts from."""
    doctor.on_evaluate(None, _state(0), None, metrics=_numbers(0.7))
    doctor.on_train_begin(None, _state(0), None)
    after = {"step": 40, **_numbers(0.7, chosen=-3.0)}
    doctor.on_evaluate(None, _state(40, after), None, metrics=after)
    assert doctor.findings.names == ["chosen_collapsing"]
    doctor.on_train_begin(None, _state(0), None)
    assert doctor.findings.names == []
    later = {"step": 40, **_numbers(0.7, chosen=-3.1)}
    doctor.on_evaluate(None, _state(40, later), None, metrics=later)
    assert doctor.findings.names == []


def test_what_the_report_has_told_is_kept_and_not_said(
    doctor: Doctor, capsys: pytest.CaptureFixture[str]
) -> None:
    doctor.report = DataReport(kept=10, chosen_longer_pairs=9)
    doctor.shown_before.add("chosen_longer")
    doctor.on_train_begin(None, _state(0), None)
    assert doctor.findings.names == ["chosen_longer"]
    assert capsys.readouterr().out == ""
