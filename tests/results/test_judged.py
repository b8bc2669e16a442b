"""A trained model judged against its start, the data and another; and chatted with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import rmipo_lite
from rmipo_lite import demo
from rmipo_lite.model.generation import Answer, prompt_ids
from tests.kit import tiny_model, word_tokenizer

PROMPTS = ["What is 2 + 2?", "What is 3 + 4?", "Tell me what a dog is."]


def _short(prompt: Any, answer: Answer) -> float:
    return -len(answer)


def test_against_the_start_as_compare_answers(run: Any) -> None:
    found = run.judge(PROMPTS, judge=_short, max_new_tokens=24)
    compared = run.compare(PROMPTS, max_new_tokens=24)
    assert [pair.answer for pair in found] == compared.after
    assert [pair.other for pair in found] == compared.before
    for _, answer, other, won in found:
        assert won == (0.5 if len(answer) == len(other) else float(len(answer) < len(other)))
    assert found.against == "the model at step 0"
    count = [len(run.tokenizer(a, add_special_tokens=False)["input_ids"]) for a in compared.after]
    assert found.tokens[0] == pytest.approx(sum(count) / 3)


def test_against_what_the_data_prefers(run: Any) -> None:
    """The held-out rows' own chosen responses, or those of rows that are given."""
    found = run.judge(judge=_short, against="chosen", max_new_tokens=16)
    rows = {row["prompt"][-1]["content"]: row["chosen"][-1]["content"]
            for row in reversed(demo.load_rows()[64:96])}  # fmt: skip
    assert len(found) == len(rows)
    assert {pair.prompt[-1]["content"]: pair.other for pair in found} == rows
    given = [{"prompt": "Say b d a backwards.", "chosen": "a d b", "rejected": "b"}]
    (pair,) = run.judge(given, judge=_short, against="chosen", max_new_tokens=16)
    assert (pair.prompt, pair.other) == ("Say b d a backwards.", "a d b")


def test_against_another_and_against_given_answers(run: Any) -> None:
    base = rmipo_lite.load_run(demo.MODEL, use_cpu=True)
    found = run.judge(PROMPTS, judge=_short, against=base, max_new_tokens=16)
    assert [pair.other for pair in found] == base.generate(PROMPTS, 16)
    assert found.against == demo.MODEL.name
    found = run.judge(PROMPTS[:2], judge=_short, against=["", "x" * 999], max_new_tokens=16)
    assert found.wins == [0.0, 1.0]


@pytest.mark.parametrize(
    ("arguments", "kind", "told"),
    [
        ({"judge": None}, TypeError, "judge: there is none"),
        ({"judge": 3}, TypeError, "judge must be a callable"),
        ({"against": "chosn"}, ValueError, 'against must be "before", "chosen"'),
        ({"against": ["one"]}, ValueError, "1 texts for 3 prompts"),
        ({"prompts": "What?"}, TypeError, r"write \[prompt\]"),
        ({"prompts": []}, ValueError, "pass some texts"),
        ({"judge": lambda prompt, answer: "good"}, ValueError, "wanted a number for an answer"),
    ],
)
def test_what_cannot_be_is_told(
    run: Any, arguments: dict[str, Any], kind: type[Exception], told: str
) -> None:
    with pytest.raises(kind, match=told):
        run.judge(**{"prompts": PROMPTS, "judge": _short, "max_new_tokens": 4, **arguments})


def test_a_run_that_was_loaded_has_no_chosen_responses(run: Any) -> None:
    loaded = rmipo_lite.load_run(run.output_dir, use_cpu=True)
    with pytest.raises(ValueError, match="pass rows with prompt, chosen"):
        loaded.judge(judge=_short, against="chosen")


# ---- chat -----------------------------------------------------------------------------------


def test_a_chat_goes_on_from_what_was_said(run: Any) -> None:
    first = run.chat("What is 2 + 2?", new=True, max_new_tokens=16)
    second = run.chat("And 3 + 4?", max_new_tokens=16)
    turns = [
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": str(first)},
        {"role": "user", "content": "And 3 + 4?"},
    ]
    assert [second] == run.generate([turns], 16)
    assert run.conversation == [*turns, {"role": "assistant", "content": str(second)}]
    assert run.chat("Hello", new=True, max_new_tokens=4) == run.generate(["Hello"], 4)[0]
    assert len(run.conversation) == 2


def test_a_turn_that_fails_is_not_kept(run: Any) -> None:
    run.chat("What is 2 + 2?", new=True, max_new_tokens=8)
    before = run.conversation
    with pytest.raises(ValueError, match="the model reads 256; begin a new one"):
        run.chat("What is 2 + 2? " * 60, max_new_tokens=8)
    assert run.conversation == before
    long = "What is 2 + 2? " * 25
    room = 256 - len(prompt_ids(run.tokenizer, long, conversational=True))
    answer = run.chat(long, new=True, max_new_tokens=10_000, min_new_tokens=room)
    assert len(run.tokenizer(answer)["input_ids"]) <= room
    assert not answer.ended  # as long as there is room, and no longer


def test_a_chat_needs_a_template(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="chat needs a tokenizer with a chat template"):
        rmipo_lite.load_run(tmp_path, use_cpu=True).chat("w1 w2")
