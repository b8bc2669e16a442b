"""What a model answers, in numbers: how long, how often without an end, how repetitive.

The losses look at given answers only. A model can win every pair and write text that repeats itself
or never ends; that shows in what it generates and nowhere else. So an evaluation answers a few of
its own prompts. Answers are sampled: greedy ones of a small model repeat themselves when it is
healthy too, and end where sampled ones have long stopped ending.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from rmipo_lite.checkpoints.random_state import kept_random_state
from rmipo_lite.model.generation import BATCH, Generated, generate_ids
from rmipo_lite.tokens.options import context_of
from rmipo_lite.tokens.pair import TokenizedPair

_LEAST_TOKENS, _MOST_TOKENS = 64, 128  # of an answer
_GRAM = 4  # tokens of a phrase that counts as repeated

MEAN_LENGTH = "completions/mean_length"  # trl's names
CLIPPED = "completions/clipped_ratio"
REPETITION = "completions/repetition"
REPETITIVE = "completions/repetitive_ratio"
_REPETITIVE = 0.5  # of an answer's phrases: it says a sentence three times or more


def completion_numbers(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[TokenizedPair],
    count: int,
    seed: int,
    told: Callable[[int, int], None] = lambda done, limit: None,
) -> dict[str, list[float]]:
    """Answer the first `count` distinct prompts of the pairs, and measure the answers.

    An answer may have twice the tokens of the pairs' median chosen response, 64 to 128. The same
    seed draws the same numbers each time; the run's own random state stays as it is. `told` hears
    of every token: how many there are of an answer, and at most.

    Returns:
        Of every answer: its tokens (the end token not counted), whether the limit cut it, the
        share of its phrases of four tokens that stood in it before, and whether that is half of
        them. Empty where no pair has a prompt that leaves room for an answer.
    """
    usual = statistics.median(len(pair.chosen_ids) for pair in pairs)
    limit = int(min(_MOST_TOKENS, max(_LEAST_TOKENS, 2 * usual)))
    context = context_of(model.config)
    longest = math.inf if context is None else context - limit
    distinct = {tuple(pair.prompt_ids): None for pair in pairs}
    prompts = [list(ids) for ids in distinct if 0 < len(ids) <= longest][:count]
    if not prompts:
        return {}
    with kept_random_state():
        torch.manual_seed(seed)
        answers = generate_ids(
            model, tokenizer, prompts, limit,
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            stopping_criteria=[Told(told, limit * math.ceil(len(prompts) / BATCH))],
        )  # fmt: skip
    repeated = [repeated_share(answer.ids) for answer in answers]
    return {
        MEAN_LENGTH: [float(_length(answer)) for answer in answers],
        CLIPPED: [float(not answer.ended) for answer in answers],
        REPETITION: repeated,
        REPETITIVE: [float(share >= _REPETITIVE) for share in repeated],
    }


class Told(StoppingCriteria):
    """Stops nothing: generation asks it after every token, and `told` hears (done, `most`)."""

    def __init__(self, told: Callable[[int, int], None], most: int) -> None:
        self._told, self._most, self._done = told, most, 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        self._done += 1
        self._told(self._done, self._most)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _length(answer: Generated) -> int:
    return len(answer.ids) - answer.ended


def repeated_share(ids: Sequence[int]) -> float:
    """Share of the runs of four tokens that stood in the text before; 0 of a text too short."""
    grams = [tuple(ids[i : i + _GRAM]) for i in range(len(ids) - _GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
