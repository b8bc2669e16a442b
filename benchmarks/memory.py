"""Peak memory of one step above what model and data take, each contender in a process of its own.

On the CPU it is the resident set: its peak during a step (the kernel's own high-water mark, reset
before) less its size just before. A first, tiny step has loaded libraries and kernels by then.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Sequence

import torch

from benchmarks import inputs, step
from benchmarks.child import ask
from benchmarks.peers import Absent
from benchmarks.records import Record
from benchmarks.rounds import Run, Summary, ratios, summarize
from rmipo_lite.ops import linear_logps
from rmipo_lite.planning.device import PeakMemory

CASES = ((32000, "fp32"), (131072, "bf16"))
DRAWS = 6
CONTENDERS = ("authors", "trl chunked head", "ours")
HEAD_SHAPES = ((1024, 32000), (1024, 131072), (1024, 262144), (4096, 32000), (16384, 32000))
_LIMIT_S = 600
_CPU = torch.device("cpu")


def bench(cases: Sequence[tuple[int, str]] = CASES, draws: int = DRAWS) -> Iterator[Record]:
    """Peak bytes of every contender over the draws, and their ratio to the authors'."""
    for vocab_size, dtype in cases:
        peaks: dict[str, list[float]] = {}
        shape = f"V={vocab_size}"
        for impl in CONTENDERS:
            try:
                peaks[impl] = _in_child("step", impl, vocab_size, dtype, draws)
            except Absent as reason:
                value = f"absent: {reason}"
                yield Record("memory", impl, shape, dtype, "peak above base", "MiB", value)
        for impl, values in peaks.items():
            mib = [value / 2**20 for value in values]
            yield Record("memory", impl, shape, dtype, "peak above base", "MiB", *summarize(mib))
            over = summarize(ratios(values, peaks["authors"]))
            yield Record("memory", impl, shape, dtype, "peak over authors'", "ratio", *over)


def bench_growth() -> Iterator[Record]:
    """The head's peak by vocabulary and tokens, less its N x H direction and gradient."""
    for name in inputs.DTYPES:
        for tokens, vocab_size in HEAD_SHAPES:
            (peak,) = _in_child("head", "ours", vocab_size, name, tokens)
            itemsize = inputs.DTYPES[name].itemsize
            results = tokens * inputs.HIDDEN_SIZE * (4 + itemsize)
            shape = f"V={vocab_size} N={tokens}"
            for metric, value in (
                ("growth: head's peak above base", peak),
                ("growth: head's peak less direction and gradient", peak - results),
            ):
                mib = Summary(*[value / 2**20] * 3)
                yield Record("memory", "ours", shape, name, metric, "MiB", *mib)


def _in_child(kind: str, impl: str, vocab_size: int, dtype: str, count: int) -> list[float]:
    question = [kind, impl, vocab_size, dtype, count]
    values: list[float] = ask(__name__, question, f"memory of {impl}", _LIMIT_S)
    return values


# ---- in the child ------------------------------------------------------------------------------


def _peaks(kind: str, impl: str, vocab_size: int, dtype: str, count: int) -> list[int] | str:
    """Peaks in bytes, or why this contender can't run here."""
    if kind == "head":
        return [_head_peak(vocab_size, inputs.DTYPES[dtype], count)]
    model = inputs.lora_llama(vocab_size, inputs.DTYPES[dtype])
    peaks = []
    with tempfile.TemporaryDirectory() as folder:
        contenders = step.Contenders(model, inputs.DTYPES[dtype], folder)
        if impl in contenders.absent:
            return contenders.absent[impl]
        # A tiny step first: what is loaded at first use isn't a step's.
        contenders.runs([inputs.tiny_pair(vocab_size)])[impl]()
        for seed in range(count):
            run = contenders.runs(inputs.draw_pairs(step.PAIRS, vocab_size, seed))[impl]
            model.zero_grad(set_to_none=True)
            peaks.append(peak_of(run))
    return peaks


def _head_peak(vocab_size: int, dtype: torch.dtype, tokens: int) -> int:
    weight = torch.randn(vocab_size, inputs.HIDDEN_SIZE).to(dtype)
    hidden = torch.randn(tokens, inputs.HIDDEN_SIZE).to(dtype)
    target_ids = torch.randint(0, vocab_size, (tokens,))

    def run(rows: int = tokens) -> None:
        leaf = hidden[:rows].detach().requires_grad_()
        linear_logps(leaf, weight, target_ids[:rows]).sum().backward()

    run(16)
    return peak_of(run)


def peak_of(run: Run) -> int:
    """Bytes by which the resident set rose above its size before the run, at most."""
    memory = PeakMemory(_CPU)
    run()
    growth = memory.growth()
    if growth is None:
        raise RuntimeError("this system doesn't tell a process's peak memory")
    return growth


if __name__ == "__main__":
    print(json.dumps(_peaks(*json.loads(sys.argv[1]))))  # noqa: T201
