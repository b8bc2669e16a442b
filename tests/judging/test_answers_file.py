"""Files of answers as the benchmarks' own programs read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rmipo_lite.demo import MODEL
from rmipo_lite.judging.answers_file import write_answers
from rmipo_lite.model.generation import Answer
from rmipo_lite.results.loaded import load_run

_TEXT = "# One\n## Two\n1. a\n- b\n**bold** __too__\n```\n# not\n- this\n```\n"


def _say(prompts: list[Any]) -> list[Answer]:
    """How often was asked, and a text with everything that is counted."""
    return [Answer(f"{len(prompt)}: {prompt[-1]['content']}\n{_TEXT}") for prompt in prompts]


def _written(tmp_path: Path, questions: Any, kind: str) -> list[dict[str, Any]]:
    path, _ = write_answers(questions, tmp_path / "out", kind, _say, len, "mine")
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []
    text = path.read_text(encoding="utf-8")
    if kind == "alpaca_eval":
        return list(json.loads(text))
    return [json.loads(line) for line in text.splitlines()]


def test_alpaca_eval(tmp_path: Path) -> None:
    rows = [{"instruction": "Hi", "dataset": "helpful_base"}, {"instruction": "Ho"}]
    (tmp_path / "eval.json").write_text(json.dumps(rows))
    found = _written(tmp_path, tmp_path / "eval.json", "alpaca_eval")
    assert [set(row) for row in found] == [
        {"instruction", "output", "generator", "dataset"},
        {"instruction", "output", "generator"},
    ]
    assert found[0]["output"].startswith("1: Hi\n")
    assert found[0]["generator"] == "mine"


def test_arena_hard(tmp_path: Path) -> None:
    question = {"uid": "a1", "category": "hard", "cluster": "x", "prompt": "Hi"}
    (tmp_path / "question.jsonl").write_text(json.dumps(question) + "\n")
    (row,) = _written(tmp_path, str(tmp_path / "question.jsonl"), "arena_hard")
    assert set(row) == {"uid", "ans_id", "model", "messages", "tstamp", "metadata"}
    assert row["messages"][0] == {"role": "user", "content": "Hi"}
    answer = row["messages"][1]["content"]["answer"]
    assert row["metadata"] == {
        "token_len": len(answer),
        "header_count": {"h1": 1, "h2": 1, "h3": 0, "h4": 0, "h5": 0, "h6": 0},
        "list_count": {"ordered": 1, "unordered": 1},
        "bold_count": {"**": 1, "__": 1},
    }


def test_mt_bench_asks_the_second_turn_after_the_first(tmp_path: Path) -> None:
    questions = [
        {"question_id": 81, "category": "writing", "turns": ["Hi", "And?"]},
        {"question_id": 82, "turns": ["Ho"]},
    ]
    found = _written(tmp_path, questions, "mt_bench")
    assert set(found[0]) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
    ((choice,), (other,)) = (row["choices"] for row in found)
    assert [turn.splitlines()[0] for turn in choice["turns"]] == ["1: Hi", "3: And?"]
    assert len(other["turns"]) == 1
    assert found[0]["answer_id"] != found[1]["answer_id"]


@pytest.mark.parametrize(
    ("questions", "kind", "wanted"),
    [
        (["Hi"], "arena_hard", "number 0 has no uid and prompt, which arena_hard needs"),
        ([{"instruction": "Hi"}, {"instruction": ""}], "alpaca_eval", "number 1 has no"),
        ([], "jsonl", "there is none"),
        ("nowhere.jsonl", "jsonl", "there is no file nowhere.jsonl"),
        (["Hi"], "csv", "format must be one of jsonl, alpaca_eval"),
    ],
)
def test_what_cannot_be_answered_is_said_before(
    questions: Any, kind: str, wanted: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=wanted):
        write_answers(questions, tmp_path / "out", kind, _say, len, "mine")
    assert not list(tmp_path.iterdir())


def test_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = load_run(MODEL, use_cpu=True)
    questions = ["What is 2 + 6?", {"prompt": "What is 3 + 4?"}]
    path = run.write_answers(questions, tmp_path / "new" / "a.jsonl", max_new_tokens=2)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["What is 2 + 6?", "What is 3 + 4?"]
    assert [row["ended"] for row in rows] == [False, False]
    assert "2, 2 of them cut at max_new_tokens=2" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match="name a new file"):
        run.write_answers(questions, path)
    run.tokenizer.chat_template = None
    run.conversational = False
    run.write_answers(["What is 2 + 6?"], tmp_path / "plain.jsonl", max_new_tokens=2)
    turns = [{"question_id": 1, "turns": ["a", "b"]}]
    with pytest.raises(ValueError, match="a second turn needs a tokenizer with a chat template"):
        run.write_answers(turns, tmp_path / "mt.jsonl", "mt_bench", max_new_tokens=2)
