"""What the demo ships, as a reader would load their own: a model's folder and preference pairs.

The pairs are two answers that the model itself gave to one question, labelled by the true reward;
the other sets here are the same pairs as another annotator would label them.
"""

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rmipo_lite.demo.task import Question, length_lovers_reward, make_pairs, questions_by_text

ASSETS = Path(__file__).parent / "assets"
MODEL = ASSETS / "tiny-llama"
PAIRS = ASSETS / "pairs.jsonl.gz"
NOISE = 0.15  # share of the noisy annotator's labels that are wrong
_EASY = 1600
_SIDES = ("chosen", "rejected")


def load_rows() -> list[dict[str, Any]]:
    """The shipped preference pairs: prompt, chosen and rejected as message lists."""
    return [json.loads(line) for line in gzip.decompress(PAIRS.read_bytes()).splitlines()]


def noisy_rows() -> list[dict[str, Any]]:
    """The shipped pairs with 15 % of the labels wrong, drawn at random."""
    rng = random.Random(2)
    return [swapped(row) if rng.random() < NOISE else row for row in load_rows()]


def length_biased_rows() -> list[dict[str, Any]]:
    """The shipped pairs, judged by somebody who likes length.

    The true reward still wants terse answers: what is trained here is a bias of the data.
    """
    return relabelled(load_rows(), length_lovers_reward)


def relabelled(
    rows: list[dict[str, Any]], reward: Callable[[Question, str], float]
) -> list[dict[str, Any]]:
    """Rows of the demo as somebody labels them who goes by `reward`; ties are left out."""
    new = []
    for row in rows:
        question = questions_by_text()[row["prompt"][0]["content"]]
        liked, other = (reward(question, row[name][0]["content"]) for name in _SIDES)
        if liked != other:
            new.append(swapped(row) if liked < other else row)
    return new


def easy_rows() -> list[dict[str, Any]]:
    """1,600 pairs made by a program: a right answer against a wrong one in the same words.

    The model tells nearly all of them apart before any training, so that the flawed ones among
    pairs like these can be found.
    """
    pairs = [pair for pair in make_pairs(2 * _EASY + 200) if pair.kind == "right/wrong"]
    return [message_row(pair.question.text, pair.chosen, pair.rejected) for pair in pairs[:_EASY]]


def swapped(row: dict[str, Any]) -> dict[str, Any]:
    """The row with the other label."""
    return {**row, "chosen": row["rejected"], "rejected": row["chosen"]}


def message_row(prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    """A row as message lists."""
    sides = {"prompt": ("user", prompt), "chosen": ("assistant", chosen)}
    sides["rejected"] = ("assistant", rejected)
    return {name: [{"role": role, "content": text}] for name, (role, text) in sides.items()}


def load_tokenizer() -> PreTrainedTokenizerBase:
    """The shipped tokenizer."""
    return AutoTokenizer.from_pretrained(MODEL)
