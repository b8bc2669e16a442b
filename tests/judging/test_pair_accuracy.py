"""Accuracy on somebody's pairs: RewardBench's columns and weights, rewards as an evaluation's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import rmipo_lite
from rmipo_lite import demo
from rmipo_lite.judging.pair_accuracy import PairAccuracy, ScoredPair


def _accuracy(*pairs: tuple[str, float, float]) -> PairAccuracy:
    rows = [ScoredPair(i, *pair) for i, pair in enumerate(pairs)]
    return PairAccuracy(rows, "mine", "mine", True, "rmipo's reward", left_out=2)


def test_accuracy_by_subset_and_section_as_rewardbench_counts() -> None:
    found = _accuracy(
        ("alpacaeval-easy", 1.0, 0.0), ("alpacaeval-easy", 0.0, 1.0), ("mt-bench-easy", 1.0, 0.0),
        ("donotanswer", 0.5, 0.5),  # the same reward isn't won
    )  # fmt: skip
    assert found.accuracy == 0.5
    assert found.by_subset == {"alpacaeval-easy": 0.5, "mt-bench-easy": 1.0, "donotanswer": 0.0}
    # By what a subset counts for there, 100 and 28, not by how many rows are here.
    assert found.sections == {
        "Chat": pytest.approx((0.5 * 100 + 1.0 * 28) / 128), "Safety": 0.0,
    }  # fmt: skip
    assert "alpacaeval-easy      2" in str(found)
    assert "2 rows left out" in str(found)


def test_its_files(tmp_path: Path) -> None:
    found = _accuracy(("own", 1.0, 0.0), ("", 0.25, 1.0))
    found.write(tmp_path / "mine.json")
    assert json.loads((tmp_path / "mine.json").read_text()) == {
        "accuracy": 0.5, "num_prompts": 2, "model": "mine", "ref_model": None, "tokenizer": "mine",
        "chat_template": "tokenizer", "extra_results": {"own": 1.0},
    }  # fmt: skip
    lines = (tmp_path / "mine_all.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"chosen": 1.0, "rejected": 0.0}, {"chosen": 0.25, "rejected": 1.0}
    ]  # fmt: skip


def _rows() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    rows = demo.load_rows()
    named = [{**row, "subset": "ab"[i % 2]} for i, row in enumerate(rows[64:88])]
    return rows[:64], named


@pytest.mark.parametrize(
    "loss_type",
    ["dpo", *(pytest.param(n, marks=pytest.mark.slow) for n in ("rmipo", "kto", "orpo"))],
)
def test_rewards_are_those_of_the_runs_own_evaluation(
    loss_type: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained_on, held_out = _rows()
    result = rmipo_lite.train(
        str(demo.MODEL), trained_on, eval_dataset=held_out, output_dir=tmp_path / "run",
        max_steps=3, learning_rate=3e-3, loss_type=loss_type, use_cpu=True, eval_completions=0,
        sample_prompts=0,
    )  # fmt: skip
    found = result.score_pairs([*held_out, {"prompt": "x", "chosen": "y", "rejected": "y"}])
    assert (len(found.pairs), found.left_out) == (24, 1)
    assert set(found.by_subset) == {"a", "b"}
    margins = [pair.chosen - pair.rejected for pair in found.pairs]
    if loss_type == "kto":  # which evaluates rows, and no pairs
        wanted = [
            result.held_out.newest["eval_rewards/chosen"][2 * i]
            - result.held_out.newest["eval_rewards/rejected"][2 * i + 1]
            for i in range(24)
        ]
        assert margins == pytest.approx(wanted, abs=1e-5)
    else:
        assert sum(margins) / 24 == pytest.approx(result.metrics["eval_rewards/margins"], abs=1e-5)
        assert found.accuracy == pytest.approx(result.metrics["eval_rewards/accuracies"])
    again = rmipo_lite.load_run(tmp_path / "run", use_cpu=True).score_pairs(held_out)
    assert [pair.chosen for pair in again.pairs] == pytest.approx(
        [pair.chosen for pair in found.pairs], abs=1e-5
    )


def test_rows_of_files_and_tables_and_what_was_cut(tmp_path: Path) -> None:
    """Several files in one, a table whose column has gaps, a response that is too long."""
    run = rmipo_lite.load_run(demo.MODEL, use_cpu=True)
    rows = _rows()[1]
    for name, some in (("one", rows[:8]), ("two", rows[8:12])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in some))
    files = [str(tmp_path / "one.jsonl"), str(tmp_path / "two.jsonl")]
    found = run.score_pairs(files)
    assert [pair.subset for pair in found.pairs] == ["a", "b"] * 6
    texts = ["p q", "r s", "t u"]
    sides = {"prompt": texts, "chosen": texts, "rejected": ["x", "word " * 400, "z"]}
    table = pd.DataFrame({**sides, "subset": [1, None, 3]})
    found = run.score_pairs(table)
    assert [pair.subset for pair in found.pairs] == ["1", "", "3"]
    assert found.cut == 1
    assert "1 pairs cut" in str(found)
    with pytest.raises(FileExistsError, match="is there already"):
        found.write(files[0])


def test_a_model_of_another_folder_is_scored_by_its_mean_log_probs() -> None:
    found = rmipo_lite.load_run(demo.MODEL, use_cpu=True).score_pairs(_rows()[1])
    assert 0.3 < found.accuracy < 0.9
    assert found.model == demo.MODEL.name
