"""How the cost of a step grows: with pairs, their length, the vocabulary and the adapter's rank.

CPU seconds of one micro-step after the other on the random Llama of `inputs`, and the same for a
token read, over that of the first row of its kind: 1 is a straight line through nothing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence

import torch

from benchmarks import inputs
from benchmarks.records import Record
from benchmarks.rounds import interleave_clocks, summarize
from benchmarks.step import our_run, pair_step
from rmipo_lite.tokens.pair import TokenizedPair

ROUNDS = 3
VOCABULARY, PAIRS, TOKENS = 32000, 4, 256  # of the rows where another is looked at
GROWING = {
    "pairs": (1, 4, 16, 64),
    "tokens a pair": (64, 256, 1024, 2048),
    "vocabulary": (32000, 65536, 131072, 262144),
    "rank": (4, 16, 64),
}
_MICRO_STEP = 4096  # what "auto" takes on a CPU with memory to spare


def bench(
    growing: dict[str, Sequence[int]] | None = None, rounds: int = ROUNDS
) -> Iterator[Record]:
    """Rows of every size of every kind."""
    for what, sizes in (growing or GROWING).items():
        first = None
        for size in sizes:
            seconds, tokens = _seconds(what, size, rounds)
            each = [value / tokens * 1e3 for value in seconds]
            first = first or summarize(each).median
            over = [value / first for value in each]
            for metric, unit, values in (
                ("CPU time", "s", seconds),
                ("CPU time a token", "ms", each),
                ("CPU time a token over the first", "ratio", over),
            ):
                found = summarize(values)
                yield Record("growth", what, f"{size} {what}", "fp32", metric, unit, *found)


def _seconds(what: str, size: int, rounds: int) -> tuple[list[float], int]:
    sizes = {"pairs": PAIRS, "tokens a pair": TOKENS, "vocabulary": VOCABULARY, "rank": 16}
    sizes[what] = size
    model = inputs.lora_llama(sizes["vocabulary"], torch.float32, rank=sizes["rank"])
    pairs = [_pair(row, sizes["tokens a pair"]) for row in range(sizes["pairs"])]
    with tempfile.TemporaryDirectory() as folder:
        step = pair_step(model, torch.float32, folder)
        step.max_tokens = _MICRO_STEP
        tokens = step.train(pairs, lambda loss: loss.backward()).num_tokens
        found = interleave_clocks({what: our_run(step, pairs)}, rounds, warm=False)
        return found[1][what], tokens


def _pair(row: int, tokens: int) -> TokenizedPair:
    """A quarter of it the prompt, the rest both responses."""
    response = 3 * tokens // 8
    return TokenizedPair(row, [9] * (tokens - 2 * response), [5] * response, [6] * response)
