"""The demo's world as tasks of the study: four annotators of answers that its model gave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rmipo_lite import demo
from rmipo_lite.demo.data import relabelled
from rmipo_lite.demo.scoring import Answer, sample_answers
from rmipo_lite.demo.task import (
    PENALTY_UNENDED,
    REWARDS,
    WORDS_FREE,
    Question,
    held_out_questions,
    true_reward,
    what_it_says,
)

MODEL = str(demo.MODEL)
_PER_WORD, _MOST = 0.025, 0.5


def longer_reward(question: Question, text: str, ended: bool = True) -> float:
    """Where longer is better: words over eight earn something instead of costing."""
    extra = max(0, len(text.split()) - WORDS_FREE)
    reward = REWARDS[what_it_says(question.fact, text)] + min(_MOST, _PER_WORD * extra)
    return reward if ended else reward - PENALTY_UNENDED


TASKS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "clean": demo.load_rows,
    "noisy": demo.noisy_rows,
    "length-loving": demo.length_biased_rows,
    "longer is better": lambda: relabelled(demo.load_rows(), longer_reward),
}


def questions() -> list[Question]:
    """The held-out prompts."""
    return held_out_questions()


def sample(model: Any, tokenizer: Any, asked: list[Question], seed: int) -> list[Answer]:
    """One answer to each."""
    return sample_answers(model, tokenizer, asked, seed)


def reward(task: str, question: Question, answer: Answer) -> float:
    """The true one of the task, whatever its annotator went by."""
    of_task = longer_reward if task == "longer is better" else true_reward
    return of_task(question, answer.text, answer.ended)


def is_garbled(question: Question, answer: Answer) -> bool:
    """No sentence of the demo's language."""
    return what_it_says(question.fact, answer.text) == "garbled"
