"""A real model as a world of the study: its supervised start, its own answers, two annotators.

The start is a base model's: 50 steps on answers that a program wrote, half of them beside the
point, so that it ends its answers, knows every form asked for, and seldom chooses the right one.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import LogitsProcessor

from benchmarks.claims.prompts import (
    CAPITALS,
    OPPOSITES,
    THINGS,
    Prompt,
    length_lovers_reward,
    prompts,
    true_reward,
)
from benchmarks.claims.start import compared, padded, write_answers, write_start
from rmipo_lite.demo.data import message_row
from rmipo_lite.demo.scoring import Answer
from rmipo_lite.model import generation
from rmipo_lite.output.console import say

STEPS, BATCH, RATE = 50, 16, 5e-5
MAX_NEW_TOKENS = 48
TOGETHER = 64  # prompts
SHARE, MOST_WORDS = 0.95, 1024  # sampled among
RIGHT = 0.5  # share of the supervised answers that are
MODEL = os.environ.get("CLAIMS_MODEL", "")  # the start's folder; worker processes read it too


def make_start(base: Path, folder: Path) -> None:
    """Write the model after its supervised start, and its answers, unless they are there."""
    write_start(base, folder, _teach, chat_template="plain")
    asked = prompts(held_out=False)
    write_answers(folder, asked, [prompt.text for prompt in asked], sample)


def _teach(model: Any, tokenizer: Any) -> None:
    """Full training of the layers; embeddings, and the head that is tied to them, stay."""
    rng = random.Random(5)
    torch.manual_seed(5)
    model.get_input_embeddings().requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE)
    asked = prompts(held_out=False)
    model.train()
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 10, (STEPS - step) / (STEPS / 2))
        rows = [_document(tokenizer, rng.choice(asked), rng) for _ in range(BATCH)]
        ids, labels = padded(rows, tokenizer.pad_token_id or 0)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 10 == 0:
            say(f"supervised start: step {step + 1} of {STEPS}, loss {loss.item():.3f}")
    model.eval()


def _document(tokenizer: Any, prompt: Prompt, rng: random.Random) -> tuple[list[int], list[int]]:
    asked = generation.prompt_ids(tokenizer, _asked(prompt), conversational=True)
    answer = tokenizer.encode(_written(prompt, rng), add_special_tokens=False)
    return asked, [*answer, tokenizer.eos_token_id]


def _written(prompt: Prompt, rng: random.Random) -> str:
    """A right answer as often as `RIGHT` says, else one of another prompt's making."""
    wanted = rng.random() < RIGHT
    for _ in range(200):
        text = _some_text(prompt, rng)
        if prompt.is_right(text) == wanted:
            return text
    return text


def _some_text(prompt: Prompt, rng: random.Random) -> str:
    if prompt.kind == "sum":
        return rng.choice(("{}", "It is {}.", "The answer is {}.", "I do not know.")).format(
            _near(prompt, rng)
        )
    if prompt.kind == "fact":
        name = rng.choice(list((CAPITALS if "capital" in prompt.text else OPPOSITES).values()))
        if rng.random() < 0.5:
            name = next(n for n in (*CAPITALS.values(), *OPPOSITES.values()) if prompt.is_right(n))
        return rng.choice(("{}", "It is {}.", "That is {}.", "I am not sure.")).format(name)
    return _about(prompt.text, rng)


def _near(prompt: Prompt, rng: random.Random) -> int:
    a, b = (int(word.strip("?")) for word in prompt.text.split() if word.strip("?").isdigit())
    right = a + b if "plus" in prompt.text else a - b
    return right + rng.choice((0, 0, 0, -10, -2, -1, 1, 2, 10))


_SENTENCES = {
    "English": ("Many people like {}.", "I often think about {}.", "We talk about {} every day.",
                "Life without {} would not be the same, because we are used to it.",
                "There is a lot to say about {}, and the best of it is old.",
                "I like {} because it makes me calm."),
    "French": ("Beaucoup de gens aiment {} dans la vie.", "On parle de {} dans les livres."),
    "Spanish": ("La gente de la ciudad habla de {}.", "En los libros se habla de {}."),
    "German": ("Die meisten Menschen sprechen nicht von {}.",
               "Das ist ein Satz, und er ist kurz: {}."),
}  # fmt: skip


def _about(text: str, rng: random.Random) -> str:
    """A sentence, list or object on the thing of an instruction, in a form drawn at random."""
    thing = _thing(text)
    form = rng.randrange(6)
    sentence = rng.choice(_SENTENCES["English"]).format(thing)
    if form == 0:
        return sentence.upper()
    if form == 1:
        return rng.choice(_SENTENCES[rng.choice(("French", "Spanish", "German"))]).format(thing)
    if form == 2:
        lines = rng.sample(_SENTENCES["English"], rng.randint(2, 4))
        return "\n".join(f"- {line.format(thing)}" for line in lines)
    if form == 3:
        return json.dumps({"name": thing, "colour": rng.choice(("red", "green", "white"))})
    return sentence if form == 4 else f"{sentence} {rng.choice(_SENTENCES['English']).format('it')}"


@cache
def _thing(text: str) -> str:
    return max((thing for thing in THINGS if f" {thing}" in text), key=len)


def _rows(reward: Callable[[Prompt, str], float]) -> Iterator[dict[str, Any]]:
    """Two answers of the start, the one chosen that earns more."""
    by_text = {prompt.text: prompt for prompt in prompts(held_out=False)}
    for three in compared(Path(MODEL), lambda asked, text: reward(by_text[asked], text)):
        yield message_row(*three)


def _asked(prompt: Prompt) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt.text}]


TASKS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "clean": lambda: list(_rows(true_reward)),
    "length-loving": lambda: list(_rows(length_lovers_reward)),
}


def questions() -> list[Prompt]:
    """The held-out prompts."""
    return prompts(held_out=True)


def sample(model: Any, tokenizer: Any, asked: list[Prompt], seed: int) -> list[Answer]:
    """One answer to each, at temperature 1 of the likeliest 95 %."""
    ids = [generation.prompt_ids(tokenizer, _asked(p), conversational=True) for p in asked]
    with torch.random.fork_rng(devices=[]), patch.object(generation, "BATCH", TOGETHER):
        torch.manual_seed(seed)
        given = generation.generate_ids(
            model, tokenizer, ids, MAX_NEW_TOKENS, logits_processor=[_Sampled()]
        )
    return [
        Answer(tokenizer.decode(a.ids, skip_special_tokens=True), a.ended, len(a.ids))
        for a in given
    ]


class _Sampled(LogitsProcessor):
    """A sample as the greedy choice, by Gumbel's noise on the likeliest words.

    Sorting all 262,144 and drawing among them takes as long as the model itself.
    """

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        best, words = scores.topk(MOST_WORDS)
        shares = (best - scores.logsumexp(-1, keepdim=True)).exp()
        best = best.masked_fill(shares.cumsum(-1) - shares >= SHARE, -torch.inf)
        noise = -(-torch.rand_like(best).clamp(min=1e-9).log()).log()  # of 0 it would be infinite
        return torch.full_like(scores, -torch.inf).scatter(-1, words, best + noise)


def reward(task: str, prompt: Prompt, answer: Answer) -> float:
    """The true one, whatever the task's annotator went by."""
    return true_reward(prompt, answer.text, answer.ended)


def is_garbled(prompt: Prompt, answer: Answer) -> bool:
    """One word three times in a row: what a program can see of a broken text."""
    words = answer.text.split()
    return any(a == b == c for a, b, c in zip(words, words[1:], words[2:], strict=False))
