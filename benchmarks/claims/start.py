"""A world's start: a base model taught a little, what it answers, and the pairs made of that."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from rmipo_lite.demo.scoring import Answer
from rmipo_lite.output.console import say
from rmipo_lite.tokens.templates import prepare_tokenizer

TRIES = 4  # answers to each prompt; two and two are compared
Row = tuple[list[int], list[int]]  # ids of prompt and answer


def write_start(
    base: Path, folder: Path, teach: Callable[[Any, Any], None], chat_template: str | None
) -> None:
    """Write the base model after its supervised start, unless it is there."""
    if (folder / "model.safetensors").exists():
        return
    tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(base), chat_template=chat_template)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    teach(model, tokenizer)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def padded(rows: Sequence[Row], pad_id: int) -> tuple[Tensor, Tensor]:
    """(ids, labels), both (B, T), of a supervised step; the answer alone is learnt."""
    width = max(len(prompt + answer) for prompt, answer in rows)
    ids = torch.full((len(rows), width), pad_id)
    labels = torch.full((len(rows), width), -100)
    for row, (prompt, answer) in enumerate(rows):
        ids[row, : len(prompt + answer)] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : len(prompt + answer)] = torch.tensor(answer)
    return ids, labels


def write_answers(
    folder: Path, asked: Sequence[Any], texts: Sequence[str],
    sample: Callable[[Any, Any, Any, int], list[Answer]],
) -> None:  # fmt: skip
    """Let the model in the folder answer everything asked, unless it has."""
    path = folder / "answers.jsonl"
    if path.exists():
        return
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tries = []
    for seed in range(TRIES):
        say(f"answering {len(asked)} prompts, {seed + 1} of {TRIES} times")
        tries.append(sample(model, tokenizer, asked, seed))
    lines = [
        json.dumps({"prompt": text, "answers": [asdict(some[place]) for some in tries]})
        for place, text in enumerate(texts)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_answers(folder: Path) -> Iterator[tuple[str, list[Answer]]]:
    """Every prompt with its answers."""
    for line in (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines():
        found = json.loads(line)
        yield found["prompt"], [Answer(**answer) for answer in found["answers"]]


def compared(folder: Path, score: Callable[[str, str], float]) -> Iterator[tuple[str, str, str]]:
    """(prompt, better, worse) of two answers that an annotator's score tells apart.

    Those that didn't end are out.
    """
    for prompt, answers in read_answers(folder):
        texts = [answer.text for answer in answers if answer.ended]
        for two in zip(texts[::2], texts[1::2], strict=False):
            worse, better = sorted(two, key=lambda text: score(prompt, text))
            if score(prompt, worse) < score(prompt, better):
                yield prompt, better, worse
