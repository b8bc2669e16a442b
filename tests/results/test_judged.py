"""A trained model judged against its start, the data and another; and chatted with."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
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


def test_what_stands_for_prompts_is_taken_or_told(run: Any) -> None:
    """A table's column names are no prompts, one conversation is no list of them."""
    rows = [{"prompt": text} for text in PROMPTS]
    found = run.judge(rows, judge=_short, max_new_tokens=4)
    assert [pair.prompt for pair in found] == PROMPTS
    frame = pd.DataFrame(rows)
    assert len(run.judge(frame["prompt"], judge=_short, max_new_tokens=4)) == 3
    for wrong, told in (
        (frame, r'got a table \(DataFrame\); write list\(table\["prompt"\]\)'),
        ({"prompt": PROMPTS}, "got a table"),
        ([{"role": "user", "content": "What?"}], "got one conversation"),
        ([3], "number 0 is neither a text nor a list of messages"),
        ([["What?"]], "number 0 is neither"),
    ):
        for ask in (run.generate, run.compare, lambda p: run.judge(p, judge=_short)):
            with pytest.raises(TypeError, match=told):
                ask(wrong)
    with pytest.raises(ValueError, match="number 0 is no valid Unicode"):
        run.generate(["half a character: \ud83d"])


def test_given_answers_are_texts(run: Any) -> None:
    said = [[{"role": "assistant", "content": "Hello"}]] * 3
    found = run.judge(PROMPTS, judge=_short, against=said, max_new_tokens=4)
    assert {str(pair.other) for pair in found} == {"Hello"}
    with pytest.raises(TypeError, match="against: number 1 is no text: None"):
        run.judge(PROMPTS, judge=_short, against=["a", None, "b"], max_new_tokens=4)


def test_a_judge_that_fails_loses_no_answer_and_changes_no_prompt(
    run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[str] = []

    def fails_first(prompt: Any, answer: Answer) -> float:
        calls.append(answer)
        prompt.append({"role": "assistant", "content": str(answer)})
        if len(calls) == 1:
            raise RuntimeError("quota")
        return len(answer)

    prompts = [[{"role": "user", "content": text}] for text in PROMPTS]
    with pytest.raises(RuntimeError, match="quota"):
        run.judge(prompts, judge=fails_first, max_new_tokens=6)
    assert capsys.readouterr().out.count("Answering 3 prompts") == 2
    found = run.judge(prompts, judge=fails_first, max_new_tokens=6)
    assert "Answering" not in capsys.readouterr().out
    assert [pair.answer for pair in found] == run.generate(PROMPTS, 6)
    assert [len(prompt) for prompt in prompts] == [1, 1, 1]
    run.judge(prompts, judge=lambda p, a: 1.0, max_new_tokens=6)
    assert "Answering 3 prompts" in capsys.readouterr().out  # kept until it was judged, no longer


def test_the_same_model_is_no_opponent(run: Any, tmp_path: Path) -> None:
    """Of two results that hold one model the weights are those trained last."""
    other = replace(run, output_dir=tmp_path)
    with pytest.raises(ValueError, match="both results hold the same model object"):
        run.judge(PROMPTS, judge=_short, against=other)
    for ask in (
        lambda: run.judge(PROMPTS, judge=_short), lambda: run.compare(PROMPTS),
        lambda: run.score_pairs(demo.load_rows()[:8]), lambda: run.save(tmp_path / "s"),
        lambda: run.merge(),
    ):  # fmt: skip
        with run.at_start(), pytest.raises(ValueError, match="trained weights aren't in force"):
            ask()
    assert run.generate(PROMPTS[:1], 4)  # and afterwards they are


def test_a_run_that_went_on_has_no_start_in_its_folder(run: Any, tmp_path: Path) -> None:
    """There the adapter's absence isn't how it began, and nothing says that it is."""
    further = rmipo_lite.train(
        str(run.output_dir), demo.load_rows()[:32], output_dir=tmp_path / "further", max_steps=1,
        learning_rate=3e-3, use_cpu=True, eval_completions=0, sample_prompts=0,
    )  # fmt: skip
    assert further.went_on
    assert not run.went_on
    wanted = further.judge(PROMPTS, judge=_short, max_new_tokens=6)
    assert [pair.other for pair in wanted] == run.generate(PROMPTS, 6)
    for folder in (tmp_path / "further", next((tmp_path / "further").glob("checkpoint-*"))):
        loaded = rmipo_lite.load_run(folder, use_cpu=True)
        for ask in (loaded.compare, partial(loaded.judge, judge=_short)):
            with pytest.raises(ValueError, match="went on with an adapter"):
                ask(PROMPTS)


def test_chosen_responses_are_each_prompts_first(
    run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "a", "chosen": text, "rejected": "x"} for text in ("one", "two", "x")]
    (pair,) = run.judge(rows, judge=_short, against="chosen", max_new_tokens=4)
    assert pair.other == "one"
    assert "3 rows, 1 of them unusable, 1 distinct prompts" in capsys.readouterr().out


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
