"""A third world of the study: a model of 260,000 parameters that goes on with children's stories.

Its start is taught to stop after two sentences, its own ones. Rewards look at wording: somebody
speaks, somebody is glad, few words. Made after the constants were frozen, to try them elsewhere.
"""

from __future__ import annotations

import os
import random
import re
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.claims.start import (
    compared,
    padded,
    read_answers,
    write_answers,
    write_start,
)
from rmipo_lite.demo.scoring import Answer
from rmipo_lite.model import generation
from rmipo_lite.output.console import say

MAX_NEW_TOKENS = 96
STEPS, BATCH, RATE = 60, 32, 1e-3  # of the supervised start
MODEL = os.environ.get("CLAIMS_MODEL", "")  # the start's folder; worker processes read it too

_NAMES = ("Tom", "Lily", "Mia", "Ben", "Sue", "Max", "Anna", "Tim", "Sara", "Jack")
_DOES = ("had", "saw", "found", "wanted", "liked")
_THINGS = ("ball", "dog", "cake", "tree", "car", "bird", "box", "boat", "hat", "flower")
_BEGINNINGS = [f"{n} {d} a big {t}." for n in _NAMES for d in _DOES for t in _THINGS]
_HELD_OUT = 100

_GLAD = {"happy", "glad", "smiled", "laughed", "proud", "excited", "loved", "fun", "hugged"}
_FEW = 20  # words
_LARGEST_SHARE_NEW = 0.1  # of an answer's words that the start never wrote


def make_start(base: Path, folder: Path) -> None:
    """Write the model after its supervised start, and its answers, unless they are there."""
    write_start(base, folder, _teach, chat_template=None)
    asked = _some(held_out=False)
    write_answers(folder, asked, asked, sample)


def _teach(model: Any, tokenizer: Any) -> None:
    """To end after two sentences, on its own texts; in full."""
    asked = _some(held_out=False)
    texts = [_two_sentences(a.text) for a in sample(model, tokenizer, asked, seed=7)]
    end = tokenizer.eos_token_id
    rows = [  # with a space of its own before the answer, as all of its answers have it then
        (tokenizer.encode(p), [*tokenizer.encode(" " + text, add_special_tokens=False), end])
        for p, text in zip(asked, texts, strict=True)
    ]
    draw = random.Random(5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    for step in range(STEPS):
        ids, labels = padded(draw.sample(rows, BATCH), end)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 20 == 0:
            say(f"supervised start: step {step + 1} of {STEPS}, loss {loss.item():.3f}")
    model.eval()


def _two_sentences(text: str) -> str:
    found = re.match(r'\s*((?:[^.!?]*[.!?]"?){1,2})', text)
    return " ".join((found.group(1) if found else text).split())


def _some(*, held_out: bool) -> list[str]:
    mixed = random.Random(3).sample(_BEGINNINGS, len(_BEGINNINGS))
    return mixed[:_HELD_OUT] if held_out else mixed[_HELD_OUT:]


def questions() -> list[str]:
    """The held-out beginnings."""
    return _some(held_out=True)


def sample(model: Any, tokenizer: Any, asked: list[str], seed: int) -> list[Answer]:
    """One answer to each, at temperature 1 of the likeliest 95 %."""
    ids = [tokenizer.encode(prompt) for prompt in asked]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        given = generation.generate_ids(
            model, tokenizer, ids, MAX_NEW_TOKENS, do_sample=True, temperature=1.0, top_p=0.95,
            top_k=0,
        )  # fmt: skip
    return [
        Answer(tokenizer.decode(a.ids, skip_special_tokens=True), a.ended, len(a.ids))
        for a in given
    ]


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def true_reward(text: str, ended: bool = True) -> float:
    """0.6 where somebody speaks, 0.4 where somebody is glad; words over 20 cost, and no end."""
    words = _words(text)
    reward = 0.6 * (text.count('"') >= 2) + 0.4 * bool(_GLAD & set(words))
    reward -= 0.02 * max(0, len(words) - _FEW)
    return reward if ended else reward - 1.0


def _rows(score: Callable[[str], float], wrong: float = 0.0) -> list[dict[str, str]]:
    draw, rows = random.Random(11), []
    for prompt, *two in compared(Path(MODEL), lambda _, text: score(text)):
        chosen, rejected = reversed(two) if draw.random() < wrong else two
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


TASKS: dict[str, Callable[[], list[dict[str, str]]]] = {
    "clean": lambda: _rows(true_reward),
    "noisy": lambda: _rows(true_reward, wrong=0.15),
    "length-loving": lambda: _rows(lambda text: true_reward(text) + 0.05 * len(_words(text))),
}


def reward(task: str, prompt: str, answer: Answer) -> float:
    """The true one, less half of it where the text is broken; whatever the annotator went by."""
    return true_reward(answer.text, answer.ended) - 0.5 * is_garbled(prompt, answer)


@cache
def _lexicon() -> Counter[str]:
    texts = [answer.text for _, answers in read_answers(Path(MODEL)) for answer in answers]
    return Counter(word for text in texts for word in _words(text))


def is_garbled(prompt: str, answer: Answer) -> bool:
    """More than a tenth of its words are none that the start ever wrote, or one stands thrice."""
    words = _words(answer.text)
    new = sum(word not in _lexicon() for word in words)
    again = any(a == b == c for a, b, c in zip(words, words[1:], words[2:], strict=False))
    return again or new > _LARGEST_SHARE_NEW * max(1, len(words))
