"""Whose answer is better: a reward function, a reward model's folder, or one of trl's judges."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from rmipo_lite.model.backbone import device_of
from rmipo_lite.model.generation import Answer, Prompt
from rmipo_lite.model.loading import load_tokenizer
from rmipo_lite.results.comparison import prompt_text

_AT_ONCE = 8  # answers through a reward model

JudgeLike = str | Path | Callable[[Any, Answer], float] | Any | None


class Judge(Protocol):
    """Says of every prompt how an answer does against another."""

    def wins(
        self, prompts: Sequence[Prompt], answers: Sequence[Answer], others: Sequence[Answer]
    ) -> list[float]:
        """1 where the answer is better, 0 where the other, 0.5 where neither; NaN: no verdict."""


def judge_of(judge: JudgeLike, model: Any) -> Judge | None:
    """The judge that is meant; None where there is none.

    Args:
        judge: a callable that takes a prompt as it stands in the dataset and an answer (a text
            with `.ended`) and gives a number, more for better; the folder or name of a reward
            model (a sequence classifier with one label); an object with trl's
            `judge(prompts, completions)`; or None.
        model: on whose device a reward model runs.

    Raises:
        ValueError, TypeError: it is none of these.
    """
    if judge is None:
        return None
    if isinstance(judge, str | os.PathLike):
        return _RewardModel(os.fspath(judge), model)
    if callable(getattr(judge, "judge", None)):
        return _Pairwise(judge)
    if callable(judge) and _takes_two(judge):
        return _Rewards(judge)
    raise TypeError(
        "judge must be a callable of a prompt and an answer, the folder of a reward model or an "
        f"object with judge(prompts, completions), got {judge!r}"
    )


def _takes_two(judge: Callable[..., Any]) -> bool:
    try:
        inspect.signature(judge).bind("prompt", "answer")
    except TypeError:
        return False
    except ValueError:  # a builtin that doesn't tell
        return True
    return True


def _won(reward: float, other: float) -> float:
    return 0.5 if reward == other else float(reward > other)


class _Rewards:
    """More reward wins."""

    def __init__(self, reward: Callable[[Any, Answer], float]) -> None:
        self._reward = reward

    def wins(
        self, prompts: Sequence[Prompt], answers: Sequence[Answer], others: Sequence[Answer]
    ) -> list[float]:
        of_answers, of_others = (self._rewards(prompts, some) for some in (answers, others))
        return [_won(a, b) for a, b in zip(of_answers, of_others, strict=True)]

    def _rewards(self, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> list[float]:
        return [
            _number(self._reward(prompt, answer), prompt)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]


def _number(value: Any, prompt: Prompt) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if math.isnan(number):
        shown = prompt_text(prompt)[:60]
        raise ValueError(f"judge: wanted a number for an answer to {shown!r}, got {value!r}")
    return number


class _RewardModel(_Rewards):
    """A sequence classifier with one label, on prompt and answer as its chat template has them."""

    def __init__(self, folder: str, model: Any) -> None:
        from transformers import AutoModelForSequenceClassification

        self._tokenizer = load_tokenizer(folder)
        self._model = AutoModelForSequenceClassification.from_pretrained(folder, dtype="auto")
        labels = self._model.config.num_labels
        if labels != 1:
            raise ValueError(f"judge: {folder} has {labels} labels; a reward model has one")
        self._model.to(device_of(model)).eval()

    def _rewards(self, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> list[float]:
        texts = [self._ids(prompt, str(a)) for prompt, a in zip(prompts, answers, strict=True)]
        found: list[float] = []
        for start in range(0, len(texts), _AT_ONCE):
            found += self._scores(texts[start : start + _AT_ONCE])
        for prompt, value in zip(prompts, found, strict=True):
            _number(value, prompt)
        return found

    def _ids(self, prompt: Prompt, answer: str) -> list[int]:
        tokenizer = self._tokenizer
        if isinstance(prompt, str):
            return list(tokenizer.encode(prompt + answer))
        turns = [*prompt, {"role": "assistant", "content": answer}]
        if not tokenizer.chat_template:
            return list(tokenizer.encode("\n".join(turn["content"] for turn in turns)))
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        return list(tokenizer.encode(text, add_special_tokens=False))

    @torch.no_grad()
    def _scores(self, rows: Sequence[list[int]]) -> list[float]:
        device = device_of(self._model)
        # One by one where there is no pad token, by which a classifier finds the end of a row.
        pad = self._model.config.get_text_config().pad_token_id
        if pad is None and len(rows) > 1:
            return [score for row in rows for score in self._scores([row])]
        width = max(map(len, rows))
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=device)
        mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows], device=device)
        scores = self._model(input_ids=ids, attention_mask=mask).logits[:, 0].float()
        return [float(score) for score in scores]


class _Pairwise:
    """A judge of trl's kind, shown the pair in both orders by turns."""

    def __init__(self, judge: Any) -> None:
        self._judge = judge

    def wins(
        self, prompts: Sequence[Prompt], answers: Sequence[Answer], others: Sequence[Answer]
    ) -> list[float]:
        texts = [prompt_text(prompt) for prompt in prompts]
        pairs = [
            [str(a), str(b)] if place % 2 == 0 else [str(b), str(a)]
            for place, (a, b) in enumerate(zip(answers, others, strict=True))
        ]
        best = self._judge.judge(texts, pairs)
        # 0 or 1 is the better one's place; -1, or anything else, is no verdict.
        return [
            float(int(b) == place % 2) if b in (0, 1) else math.nan for place, b in enumerate(best)
        ]
