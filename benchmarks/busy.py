"""What a busy neighbour costs: the same work by one and two threads, beside a process on one core.

Threads of torch's OpenMP (libgomp) wait for each other by spinning, and one whose mate has no core
spins on. GOMP_SPINCOUNT says how long; it is read when torch is loaded, so it can't be the
package's to set.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from benchmarks.child import ask
from benchmarks.records import Record
from benchmarks.rounds import ratios, summarize
from rmipo_lite.output.console import say

ROUNDS = 3
THREADS = {
    "two threads": {"OMP_NUM_THREADS": "2"},
    "two, spin 1000": {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "1000"},
    "two, spin 100": {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "100"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
# Head: 256 rows of 512 by 32,768 words. Small head: 64 rows of 128 by 1,024, its regions some
# microseconds long. Small model: 4 layers of 128, 8 rows of 48 tokens, in plain PyTorch.
TIMES = {"head": 10, "small head": 1000, "small model": 20}
_LIMIT_S = 600.0
_NEIGHBOUR = """import os
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
while True:
    pass"""


def bench(rounds: int = ROUNDS, threads: dict[str, dict[str, str]] = THREADS) -> Iterator[Record]:
    """CPU seconds and time of every work, alone, beside a neighbour, and the two's ratio."""
    found: dict[tuple[str, bool], list[dict[str, list[float]]]] = {}
    for _ in range(rounds):
        for name, environment in threads.items():
            for is_busy in (False, True):
                with _neighbour(is_busy):
                    answer = ask("benchmarks.busy", "work", name, _LIMIT_S, environment)
                found.setdefault((name, is_busy), []).append(answer)
    for work in TIMES:
        for name in threads:
            for place, clock in enumerate(("CPU time", "time")):
                alone, beside = (
                    [answer[work][place] for answer in found[name, is_busy]]
                    for is_busy in (False, True)
                )
                for metric, unit, values in (
                    (clock, "s", alone),
                    (f"{clock}, busy core", "s", beside),
                    (f"{clock}, busy over quiet", "ratio", ratios(beside, alone)),
                ):
                    yield Record("busy", name, work, "fp32", metric, unit, *summarize(values))


@contextmanager
def _neighbour(is_busy: bool) -> Iterator[None]:
    """A process that keeps one core busy, until the block ends."""
    if not is_busy:
        yield
        return
    neighbour = subprocess.Popen([sys.executable, "-c", _NEIGHBOUR])
    try:
        yield
    finally:
        neighbour.kill()
        neighbour.wait()


def _works() -> dict[str, Callable[[], object]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    from rmipo_lite.ops import linear_logps

    def head(rows: int, width: int, words: int) -> Callable[[], object]:
        hidden, weight = torch.randn(rows, width).requires_grad_(), torch.randn(words, width)
        ids = torch.randint(words, (rows,))
        return lambda: linear_logps(hidden, weight, ids).sum().backward()

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=128, intermediate_size=344, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=4, vocab_size=512,
        )
    )  # fmt: skip
    ids = torch.randint(512, (8, 48))
    return {
        "head": head(256, 512, 32768),
        "small head": head(64, 128, 1024),
        "small model": lambda: model(input_ids=ids, labels=ids).loss.backward(),
    }


def _measured() -> dict[str, tuple[float, float]]:
    """CPU seconds and seconds of each work."""
    found = {}
    for name, work in _works().items():
        for _ in range(3):
            work()
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(TIMES[name]):
            work()
        found[name] = time.process_time() - cpu, time.perf_counter() - wall
    return found


if __name__ == "__main__":
    say(json.dumps(_measured()))
