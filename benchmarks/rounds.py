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
    return interleave_clocks(contenders, rounds, seed)[0]


def interleave_clocks(
    contenders: Mapping[str, Run], rounds: int, seed: int = 0, *, warm: bool = True
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """The same with this process's CPU seconds beside; `warm`: with a round that isn't counted."""
    wall: dict[str, list[float]] = {name: [] for name in contenders}
    cpu: dict[str, list[float]] = {name: [] for name in contenders}
    shuffle = random.Random(seed).shuffle
    for index in range(-1 if warm else 0, rounds):
        order = list(contenders)
        shuffle(order)
        for name in order:
            taken = _timed(contenders[name])
            if index >= 0:
                wall[name].append(taken[0])
                cpu[name].append(taken[1])
    return wall, cpu


def _timed(run: Run) -> tuple[float, float]:
    gc.collect()
    gc.disable()
    try:
        _wait()
        start, used = time.perf_counter(), time.process_time()
        run()
        _wait()
        return time.perf_counter() - start, time.process_time() - used
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
