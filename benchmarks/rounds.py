"""Interleaved timing: every contender once per round, so that a busy machine slows all alike.

What is compared is the ratio within a round; its median and spread over the rounds are reported.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

Run = Callable[[], object]


class Summary(NamedTuple):
    """A median with the range of the middle half."""

    median: float
    low: float  # lower quartile
    high: float  # upper quartile


def interleave(contenders: Mapping[str, Run], rounds: int, seed: int = 0) -> dict[str, list[float]]:
    """Seconds of each contender in each round.

    The order is drawn anew for every round, so that nobody always runs after the same neighbour.
    A round before them isn't counted: it pays for what is made once per shape.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    shuffle = random.Random(seed).shuffle
    for index in range(-1, rounds):
        order = list(contenders)
        shuffle(order)
        for name in order:
            elapsed = _timed(contenders[name])
            if index >= 0:
                seconds[name].append(elapsed)
    return seconds


def _timed(run: Run) -> float:
    gc.collect()
    gc.disable()
    try:
        _wait()
        start = time.perf_counter()
        run()
        _wait()
        return time.perf_counter() - start
    finally:
        gc.enable()


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def summarize(values: Sequence[float]) -> Summary:
    """Median and quartiles."""
    if len(values) == 1:
        return Summary(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Summary(median, low, high)


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Round by round, ours over theirs."""
    return [a / b for a, b in zip(ours, theirs, strict=True)]
