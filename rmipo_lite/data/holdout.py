"""Pairs put aside for evaluation, none of which shares a prompt with the others."""

import json
import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, TypeVar

from rmipo_lite.data.rows import Row

MIN_PAIRS_TO_HOLD_OUT = 8  # fewer pairs are too few to lose any
# One evaluation takes at most this share of a run. A trained pair goes through the model backward
# too: with an adapter, on Gemma 3 270M, that is some 80 % more.
_SHARE_OF_A_RUN, _FORWARD = 0.1, 0.55
_LEAST_EVALUATED = 8  # pairs; of fewer no number says anything

Pair = TypeVar("Pair")


def split_holdout(
    pairs: Sequence[Pair], share: float = 0.05, at_most: int = 200, seed: int = 0
) -> tuple[list[Pair], list[Pair]]:
    """(train, held out), no prompt in both; the same for the same input and seed.

    Prompts are drawn at random and taken with all their pairs while they fit into
    min(at_most, share * len(pairs)), rounded, at least one. Below eight pairs, or with one prompt
    alone, nothing is held out. Takes `Row`s or `TokenizedPair`s; keeps their order.
    """
    if not 0 <= share < 1:
        raise ValueError(f"share: wanted a number from 0 up to 1, got {share}")
    groups: dict[Any, list[int]] = defaultdict(list)
    for position, pair in enumerate(pairs):
        groups[_prompt_key(pair)].append(position)
    if share == 0 or at_most == 0 or len(pairs) < MIN_PAIRS_TO_HOLD_OUT or len(groups) < 2:
        return list(pairs), []
    room = min(at_most, max(1, round(share * len(pairs))))
    drawn = list(groups.values())
    random.Random(seed).shuffle(drawn)
    held: set[int] = set()
    for positions in drawn:
        if len(held) + len(positions) <= room:
            held.update(positions)
    train = [pair for position, pair in enumerate(pairs) if position not in held]
    return train, [pair for position, pair in enumerate(pairs) if position in held]


def evaluated_part(held_out: Sequence[Pair], trained: int, seed: int = 0) -> list[Pair]:
    """As many of the held-out pairs as a run that trains on `trained` pairs has time to evaluate.

    At most a tenth of the run's time, but eight pairs at least; drawn at random, the same for the
    same seed, a longer run's draw holding a shorter one's. Keeps their order.
    """
    room = max(_LEAST_EVALUATED, int(trained * _SHARE_OF_A_RUN / _FORWARD))
    drawn = list(range(len(held_out)))
    random.Random(seed).shuffle(drawn)
    return [held_out[position] for position in sorted(drawn[:room])]


def _prompt_key(pair: Any) -> Any:
    if isinstance(pair, Row):
        return pair.prompt if isinstance(pair.prompt, str) else json.dumps(pair.prompt)
    return tuple(pair.prompt_ids)
