"""Whose answer is better: a reward function, a reward model, a judge of pairs, one of trl's."""

from __future__ import annotations

import copy
import inspect
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from rmipo_lite.model.backbone import device_of
from rmipo_lite.model.generation import Answer, Prompt, prompt_text
from rmipo_lite.model.loading import load_tokenizer
from rmipo_lite.output.console import say
from rmipo_lite.tokens.options import context_of

_AT_ONCE = 8  # answers through a reward model

JudgeLike = str | Path | Callable[..., Any] | Any | None
_ByPlaces = Callable[[list[Prompt], list[list[Answer]]], Sequence[Any]]


class Judge(Protocol):
    """Says of every prompt how an answer does against another."""

    def wins(
        self, prompts: Sequence[Prompt], answers: Sequence[Answer], others: Sequence[Answer]
    ) -> list[float]:
        """1 where the answer is better, 0 where the other, 0.5 where neither; NaN: no verdict."""


def judge_of(judge: JudgeLike, model: Any, *, conversational: bool = False) -> Judge | None:
    """The judge that is meant; None where there is none.

    Args:
        judge: a callable that takes a prompt as it stands in the dataset and an answer (a text
            with `.ended`) and gives a number, more for better; one that takes a prompt and two
            answers and gives 0 where the first is better, 1 where the second, None where neither;
            the folder or name of a reward model (a sequence classifier with one label); an object
            with trl's `judge(prompts, completions)`; or None. Whoever sees both answers is asked
            in both orders, and where these disagree neither won; -1 is no verdict.
        model: on whose device a reward model runs.
        conversational: whether a text is one user turn, which a reward model's template renders.

    Raises:
        ValueError, TypeError: it is none of these.
    """
    if judge is None:
        return None
    if isinstance(judge, str | os.PathLike):
        return _RewardModel(os.fspath(judge), model, conversational)
    if isinstance(judge, nn.Module):
        raise TypeError("judge: of a reward model its folder is wanted, got the model itself")
    of_trl = getattr(judge, "judge", None)
    if callable(of_trl) and not inspect.isclass(judge) and _arguments(of_trl) == {2}:
        return _Pairwise(lambda prompts, pairs: of_trl([*map(prompt_text, prompts)], pairs))
    if callable(judge) and not inspect.iscoroutinefunction(judge):
        taken = _arguments(judge)
        if 2 in taken:
            return _Rewards(judge)
        if 3 in taken:
            return _Pairwise(lambda *both: _of_two(judge, *both))
    raise TypeError(
        "judge must be a callable of a prompt and one or two answers, the folder of a reward model "
        f"or an object with judge(prompts, completions), got {judge!r}"
    )


def _of_two(
    judge: Callable[[Prompt, Answer, Answer], Any],
    prompts: list[Prompt],
    pairs: list[list[Answer]],
) -> list[Any]:
    return [judge(prompt, *pair) for prompt, pair in zip(prompts, pairs, strict=True)]


def _arguments(judge: Callable[..., Any]) -> set[int]:
    """With how many arguments it can be called; none where it doesn't say, as `*args`."""
    try:
        signature = inspect.signature(judge)
    except ValueError:  # a builtin that doesn't tell
        return {2}
    if any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values()):
        return set()
    return {count for count in (2, 3) if _binds(signature, count)}


def _binds(signature: inspect.Signature, count: int) -> bool:
    try:
        signature.bind(*["given"] * count)
    except TypeError:
        return False
    return True


def _won(reward: float, other: float) -> float:
    if math.isnan(reward) or math.isnan(other):
        return math.nan
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
        # Copies: whoever puts the answer behind the messages doesn't change the data.
        return [
            _number(self._reward(copy.deepcopy(prompt), answer), prompt)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]


def _number(value: Any, prompt: Prompt) -> float:
    try:
        number = float(value.item() if hasattr(value, "item") else value)
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if math.isnan(number):
        shown = prompt_text(prompt)[:60]
        raise ValueError(f"judge: wanted a number for an answer to {shown!r}, got {value!r}")
    return number


class _RewardModel(_Rewards):
    """A sequence classifier with one label, on prompt and answer as its chat template has them."""

    def __init__(self, folder: str, model: Any, conversational: bool) -> None:
        from transformers import AutoModelForSequenceClassification

        self._tokenizer = load_tokenizer(folder)
        self._model = AutoModelForSequenceClassification.from_pretrained(folder, dtype="auto")
        labels = self._model.config.num_labels
        if labels != 1:
            raise ValueError(f"judge: {folder} has {labels} labels; a reward model has one")
        self._model.to(device_of(model)).eval()
        self._conversational = conversational
        self._context = context_of(self._model.config) or math.inf

    def _rewards(self, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> list[float]:
        texts = [self._ids(prompt, str(a)) for prompt, a in zip(prompts, answers, strict=True)]
        fits = [place for place, ids in enumerate(texts) if len(ids) <= self._context]
        if len(fits) < len(texts):
            say(
                f"judge: {len(texts) - len(fits)} of {len(texts)} answers with their prompts are "
                f"longer than the {self._context} tokens that the reward model reads: no verdict"
            )
        found = [math.nan] * len(texts)
        for start in range(0, len(fits), _AT_ONCE):
            some = fits[start : start + _AT_ONCE]
            for place, score in zip(some, self._scores([texts[p] for p in some]), strict=True):
                found[place] = _number(score, prompts[place])
        return found

    def _ids(self, prompt: Prompt, answer: str) -> list[int]:
        tokenizer = self._tokenizer
        if isinstance(prompt, str):
            if not (self._conversational and tokenizer.chat_template):
                return list(tokenizer.encode(prompt + answer))
            prompt = [{"role": "user", "content": prompt}]
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
    """Somebody who is shown both answers, in both orders: which is first must not decide."""

    def __init__(self, better: _ByPlaces) -> None:
        self._better = better

    def wins(
        self, prompts: Sequence[Prompt], answers: Sequence[Answer], others: Sequence[Answer]
    ) -> list[float]:
        found = [0.5] * len(prompts)
        # Whoever answers the same has neither won nor lost, and nobody need be asked.
        told = [
            place
            for place, (one, other) in enumerate(zip(answers, others, strict=True))
            if one != other or one.ended != other.ended
        ]
        asked = [prompts[place] for place in told]
        pairs = [[answers[place], others[place]] for place in told]
        first = self._places(asked, pairs)
        second = self._places(asked, [pair[::-1] for pair in pairs])
        for place, one, other in zip(told, first, second, strict=True):
            found[place] = _agreed(1 - one, other)
        return found

    def _places(self, prompts: list[Prompt], pairs: list[list[Answer]]) -> list[float]:
        """Of each pair the place of the better answer; 0.5: neither, NaN: no verdict."""
        if not prompts:
            return []
        given = self._better([copy.deepcopy(prompt) for prompt in prompts], pairs)
        try:
            given = list(given)
        except TypeError:
            raise ValueError(f"judge: wanted a list of places, got {given!r}") from None
        if len(given) != len(prompts):
            raise ValueError(f"judge: {len(given)} places for {len(prompts)} prompts")
        return [_place(one, prompt) for one, prompt in zip(given, prompts, strict=True)]


def _agreed(won: float, also: float) -> float:
    """What both orders say, else neither; NaN where one has no verdict."""
    if math.isnan(won) or math.isnan(also):
        return math.nan
    return won if won == also else 0.5


def _place(given: Any, prompt: Prompt) -> float:
    if given is None:
        return 0.5
    if isinstance(given, bool | np.bool_):  # it would say whether the first is, or the second
        raise ValueError(
            f"judge: wanted the place of the better answer, 0 or 1, None or -1, got {given!r}"
        )
    number = _number(given, prompt)
    if number == -1:
        return math.nan
    if number not in (0, 1):
        raise ValueError(f"judge: wanted 0 or 1, whose answer is better, None or -1, got {given!r}")
    return number
