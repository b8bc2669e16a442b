"""What a world's start model answers, in a file beside its weights, and the pairs made of that."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from rmipo_lite.demo.scoring import Answer
from rmipo_lite.output.console import say

TRIES = 4  # answers to each prompt; two and two are compared
Sampler = Callable[[object, object, int], list[Answer]]  # model, tokenizer, seed


def write_answers(folder: Path, prompts: Sequence[str], sample: Sampler) -> None:
    """Let the model in the folder answer every prompt, unless it has."""
    path = folder / "answers.jsonl"
    if path.exists():
        return
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    tries = []
    for seed in range(TRIES):
        say(f"answering {len(prompts)} prompts, {seed + 1} of {TRIES} times")
        tries.append(sample(model, tokenizer, seed))
    lines = [
        json.dumps({"prompt": prompt, "answers": [asdict(some[place]) for some in tries]})
        for place, prompt in enumerate(prompts)
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
