"""Whose answer is better, by a function, a reward model's folder, and a judge of trl's kind."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from rmipo_lite.judging.judges import judge_of
from rmipo_lite.model.generation import Answer
from tests.kit import VOCAB, tiny_model, word_tokenizer

PROMPTS = ["w5 w6", "w7", "w8 w9 w10"]


def _answers(*texts: str) -> list[Answer]:
    return [Answer(text) for text in texts]


def test_a_function_of_prompt_and_answer() -> None:
    judge = judge_of(lambda prompt, answer: len(answer) * answer.ended, None)
    assert judge is not None
    cut = Answer("a long one")
    cut.ended = False
    answers = [*_answers("aa", "a"), cut]
    assert judge.wins(PROMPTS, answers, _answers("a", "a", "b")) == [1.0, 0.5, 0.0]
    with pytest.raises(ValueError, match="wanted a number for an answer to 'w5 w6', got None"):
        judge_of(lambda prompt, answer: None, None).wins(PROMPTS, answers, answers)  # type: ignore[union-attr]


def _reward_model(folder: Path, labels: int = 1, pad: int | None = 0) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_labels=labels, pad_token_id=pad,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return model


@pytest.mark.parametrize("pad", [0, None])
def test_the_folder_of_a_reward_model(pad: int | None, tmp_path: Path) -> None:
    model, tokenizer = _reward_model(tmp_path, pad=pad), word_tokenizer()
    judge = judge_of(tmp_path, tiny_model("llama"))
    assert judge is not None
    one, other = _answers(" w11 w12", " w13", " w14"), _answers(" w15", " w16 w17 w18", " w14")

    def score(prompt: str, answer: str) -> float:
        with torch.no_grad():
            return float(model(torch.tensor([tokenizer.encode(prompt + answer)])).logits)

    wanted = [
        0.5 if a == b else float(score(p, a) > score(p, b))
        for p, a, b in zip(PROMPTS, one, other, strict=True)
    ]
    assert judge.wins(PROMPTS, one, other) == wanted
    assert {0.5} < set(wanted)


def test_a_classifier_of_several_labels_is_no_reward_model(tmp_path: Path) -> None:
    _reward_model(tmp_path, labels=3)
    with pytest.raises(ValueError, match="has 3 labels; a reward model has one"):
        judge_of(str(tmp_path), tiny_model("llama"))


def test_whoever_sees_both_answers_is_asked_in_both_orders() -> None:
    """trl's kind, and a function of two answers: who prefers the first place has no favourite."""

    class Trls:
        def __init__(self, better: Any) -> None:
            self.better, self.seen = better, []

        def judge(self, prompts: list[str], completions: list[list[str]]) -> list[int]:
            assert all(isinstance(prompt, str) for prompt in prompts)
            self.seen.append(completions)
            return [self.better(*pair) for pair in completions]

    def longer(one: str, other: str) -> int:
        return int(len(other) > len(one))

    answers, others = _answers("aa", "b", "same"), _answers("b", "aaa", "same")
    trls = Trls(longer)
    assert judge_of(trls, None).wins(PROMPTS, answers, others) == [1.0, 0.0, 0.5]  # type: ignore[union-attr]
    # What is the same in both is a tie that nobody is asked about.
    assert trls.seen == [[["aa", "b"], ["b", "aaa"]], [["b", "aa"], ["aaa", "b"]]]

    def wins(better: Any) -> list[float]:
        judge = judge_of(lambda prompt, one, other: better(one, other), None)
        assert judge is not None
        return judge.wins(PROMPTS, answers, others)

    assert wins(longer) == [1.0, 0.0, 0.5]
    assert wins(lambda one, other: 0) == [0.5, 0.5, 0.5]  # the first, whatever it is
    assert wins(lambda one, other: None) == [0.5, 0.5, 0.5]
    half_sure = wins(lambda one, other: None if one == "aa" else longer(one, other))
    assert half_sure == [0.5, 0.0, 0.5]
    refuses = wins(lambda one, other: -1 if "aa" in (one, other) else longer(one, other))
    assert math.isnan(refuses[0])
    assert refuses[1:] == [0.0, 0.5]
    for wrong in (2, 0.7, "A", True, np.bool_(False)):  # a bool would say which is better?
        with pytest.raises(ValueError, match="judge: wanted"):
            wins(lambda one, other, wrong=wrong: wrong)


@pytest.mark.parametrize("given", [None, [1], [1, 0, 1, 0]])
def test_as_many_places_as_prompts_are_wanted(given: Any) -> None:
    class Trls:
        def judge(self, prompts: list[str], completions: list[list[str]]) -> Any:
            return given

    judge = judge_of(Trls(), None)
    assert judge is not None
    with pytest.raises(ValueError, match=r"judge: (wanted a list|\d places for 3 prompts)"):
        judge.wins(PROMPTS, _answers("a", "b", "c"), _answers("x", "y", "z"))


@pytest.mark.parametrize("number", [torch.tensor([[13.0]]), np.array([13]), np.float32(13), True])
def test_numbers_of_every_kind(number: Any) -> None:
    judge = judge_of(lambda prompt, answer: number, None)
    assert judge is not None
    assert judge.wins(PROMPTS, _answers("a", "b", "c"), _answers("x", "y", "z")) == [0.5] * 3


def test_a_reward_model_reads_texts_as_the_run_does_and_no_more_than_it_can(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _reward_model(tmp_path)
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}w9 {{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    judge = judge_of(tmp_path, tiny_model("llama"), conversational=True)
    assert judge._ids("w5", "w6") == tokenizer.encode("w9 w5 w9 w6")  # type: ignore[union-attr]
    plain = judge_of(tmp_path, tiny_model("llama"))
    assert plain._ids("w5", "w6") == tokenizer.encode("w5w6")  # type: ignore[union-attr]
    judge._context = 5  # type: ignore[union-attr]
    wins = judge.wins(["w5", "w5"], _answers("w6", "w6 w7 w8"), _answers("w7", "w6"))  # type: ignore[union-attr]
    assert wins[0] in (0.0, 1.0)
    assert math.isnan(wins[1])
    assert "longer than the 5 tokens that the reward model reads" in capsys.readouterr().out


def test_no_judge_and_what_is_none() -> None:
    assert judge_of(None, None) is None

    class OfTruth:
        """trl's binary judges, whose verdict is no place."""

        def judge(self, prompts: Any, completions: Any, gold_completions: Any) -> Any: ...

    class OfPlaces:
        def judge(self, prompts: Any, completions: Any) -> Any: ...

    async def later(prompt: Any, answer: Any) -> float:
        return 1.0

    wrongs = (3, lambda answer: 1.0, lambda *answers: 1.0, OfTruth(), OfPlaces, later)
    for wrong in wrongs:
        with pytest.raises(TypeError, match="judge must be a callable of a prompt and one or two"):
            judge_of(wrong, None)
