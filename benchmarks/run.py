"""Which benchmark writes which rows where."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from benchmarks import ROOT, records
from benchmarks.records import Record
from rmipo_lite.demo.data import MODEL, PAIRS
from rmipo_lite.output.console import say

# glibc keeps what is freed instead of handing it back, so that no step pays for fresh pages. The
# authors' step gains most: it allocates gigabytes anew each time.
_KEEPING = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "MALLOC_TOP_PAD_": str(2**28),
}
_KEEPING_NOTE = ", memory kept"


def run(
    what: str,
    folder: Path,
    *,
    quick: bool = False,
    pairs: Path | None = None,
    tokenizer: Path | None = None,
    model: Path | None = None,
    part: str | None = None,
    seconds: float | None = None,
) -> Path:
    """Measure, print every row as it comes, and write them to `folder`/<what>.csv.

    `quick` takes one small shape and one round, to see that everything runs, and writes to
    `folder`/quick: it is no measurement. Of "gpu", `part` is "head", "step" or "peers" alone, and
    `seconds` is what its whole steps may take together.
    """
    if what == "gpu":
        if not quick and not torch.cuda.is_available():
            raise RuntimeError("gpu measures an NVIDIA GPU; --quick rehearses it without one")
    elif torch.cuda.is_available():
        raise RuntimeError(
            "these benchmarks measure the CPU; hide the GPU with CUDA_VISIBLE_DEVICES= to run them"
        )
    # What is quick never stands among the measurements.
    path = (folder / "quick" if quick else folder) / f"{what}.csv"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the peers'
        warnings.filterwarnings("always", "rmipo_lite: ")  # ours: the kernels are missing
        for row in _rows(what, quick, pairs, tokenizer, model, part, seconds):
            say(line(row))
            records.write(path, [row])  # each at once: time on a card may end before the rows do
    if what == "step" and not quick and not _keeps_memory():
        # The allocator reads its settings when a process starts.
        subprocess.run(
            [sys.executable, "-m", "benchmarks", "step", "--output_dir", str(folder.resolve())],
            cwd=ROOT,
            env={**os.environ, **_KEEPING},
            check=True,
        )
    return path


def line(row: Record) -> str:
    """A row for people."""
    value = row.value
    if isinstance(value, float):
        value = f"{value:.4g} {row.unit}"
        if row.low != row.high:
            value += f"   (middle half {row.low:.4g} to {row.high:.4g})"
    return f"{row.op:10s}{row.impl:21s}{row.shape:28s}{row.dtype:5s}{row.metric:34s}{value}"


def _keeps_memory() -> bool:
    return all(os.environ.get(name) == value for name, value in _KEEPING.items())


def _rows(
    what: str,
    quick: bool,
    pairs: Path | None,
    tokenizer: Path | None,
    model: Path | None = None,
    part: str | None = None,
    seconds: float | None = None,
) -> Iterator[Record]:
    from benchmarks import (
        busy,
        compare,
        data,
        dpo,
        drift,
        estimates,
        gpu_head,
        gpu_step,
        growth,
        head,
        memory,
        merge,
        methods,
        processes,
        real,
        roofline,
        step,
    )

    if what == "data":
        return data.bench(
            pairs or PAIRS,
            tokenizer or MODEL,
            rounds=1 if quick else data.ROUNDS,
        )
    if what == "head":
        return head.bench_quick() if quick else chain(head.bench(), head.bench_growth())
    if what == "gpu":
        parts = {
            "head": gpu_head.bench(quick),
            "step": gpu_step.bench(quick, seconds or gpu_step.BUDGET_S),
            "peers": gpu_head.bench_peers(quick),
        }
        return chain.from_iterable(parts.values()) if part is None else parts[part]
    if what == "methods":
        return methods.bench(("dpo", "cpo") if quick else tuple(methods.METHODS))
    if what == "compare":
        return compare.bench(quick=quick)
    if what == "processes":
        return processes.bench()
    if what == "real":
        if model is None or pairs is None:
            raise ValueError("real wants --model, a model's folder, and --pairs, a file of pairs")
        return real.bench(model, pairs, rounds=2 if quick else real.ROUNDS)
    if what == "growth":
        return growth.bench({"pairs": (1,)}, rounds=1) if quick else growth.bench()
    if what == "drift":
        some: dict[str, Any] = {"rates": (1e-3,), "steps": 2, "batch": 4} if quick else {}
        return drift.bench(model or MODEL, pairs or PAIRS, **some)
    if what == "busy":
        return busy.bench(1, {"one thread": busy.THREADS["one thread"]}) if quick else busy.bench()
    if what == "roofline":
        return roofline.rows(quick=quick)
    if what == "dpo":
        return dpo.bench(draws=2, vocab_size=32000) if quick else dpo.bench()
    if what == "merge":
        return merge.bench(model or MODEL, pairs or PAIRS, steps=2 if quick else merge.STEPS)
    if what == "estimate":
        return estimates.bench(estimates.CASES[:1], steps=2) if quick else estimates.bench()
    if what == "memory":
        if quick:
            return memory.bench([(32000, "fp32")], draws=1)
        return chain(memory.bench(), memory.bench_growth())
    if quick:
        return step.bench([(32000, "fp32")], draws=1, rounds=1)
    if _keeps_memory():
        return step.bench(step.KEEPING_CASES, note=_KEEPING_NOTE)
    benches: list[Callable[[], Iterator[Record]]] = [
        step.bench,
        step.bench_growth,
        step.bench_overhead,
    ]
    return chain.from_iterable(bench() for bench in benches)
