"""One micro-step, forward and backward: ours against the authors', trl's and the floor."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from rmipo_lite.bench import inputs, peers
from rmipo_lite.bench.authors import authors_step, pad_pairs
from rmipo_lite.bench.floors import StepFloor
from rmipo_lite.bench.records import Record
from rmipo_lite.bench.rounds import Run, interleave, ratios, summarize
from rmipo_lite.config import RMiPOConfig
from rmipo_lite.step import PairStep
from rmipo_lite.tokenization import TokenizedPair

# (vocabulary, dtype) of the models measured by default
CASES = ((32000, "fp32"), (131072, "fp32"), (32000, "bf16"), (131072, "bf16"))
PAIRS = 2  # in a micro-step
DRAWS, ROUNDS = 6, 3


def autocast(dtype: torch.dtype) -> Callable[[], AbstractContextManager[Any]]:
    """What the trainer wraps the model in: bf16 autocast for bf16 weights, nothing for fp32."""
    enabled = dtype == torch.bfloat16
    return lambda: torch.autocast("cpu", torch.bfloat16, enabled=enabled)


def pair_step(model: nn.Module, dtype: torch.dtype, folder: str, **options: Any) -> PairStep:
    """Our step as the trainer makes it."""
    args = RMiPOConfig(folder, use_cpu=True, bf16=dtype == torch.bfloat16, **options)
    return PairStep(model, args, max_tokens=10**9, packing=True, autocast=autocast(dtype))


def contenders(
    model: nn.Module, dtype: torch.dtype, pairs: Sequence[TokenizedPair], folder: str
) -> dict[str, Run]:
    """Every step on the same model and pairs, forward and backward, gradients dropped before."""
    padded, cast = pad_pairs(pairs), autocast(dtype)
    ours, cached = (pair_step(model, dtype, folder, prior=prior) for prior in ("live", "cached"))
    cached.prior_cache = cached.prior_means(pairs)
    trl_chunked = peers.TrlChunkedStep(model)

    def run(step: Callable[[], object]) -> Run:
        def call() -> None:
            model.zero_grad(set_to_none=True)
            step()

        return call

    def authors() -> None:
        with cast():
            loss = authors_step(model, padded).loss
        loss.backward()

    def chunked() -> None:
        with cast():
            loss = trl_chunked(padded)
        loss.backward()

    return {
        "authors": run(authors),
        "trl chunked head": run(chunked),
        "ours": run(lambda: ours.train(pairs, lambda loss: loss.backward())),
        "ours, prior cached": run(lambda: cached.train(pairs, lambda loss: loss.backward())),
        "floor": run(StepFloor(model, pairs)),
    }


def bench(
    cases: Sequence[tuple[int, str]] = CASES, draws: int = DRAWS, rounds: int = ROUNDS
) -> Iterator[Record]:
    """Rows of every case: seconds of each contender, its ratio to the authors', ours to the floor.

    Medians and quartiles are over draws x rounds.
    """
    for vocab_size, name in cases:
        dtype = inputs.DTYPES[name]
        model = inputs.lora_llama(vocab_size, dtype)
        seconds: dict[str, list[float]] = {}
        with tempfile.TemporaryDirectory() as folder:
            for seed in range(draws):
                pairs = inputs.draw_pairs(PAIRS, vocab_size, seed)
                for who, times in interleave(
                    contenders(model, dtype, pairs, folder), rounds
                ).items():
                    seconds.setdefault(who, []).extend(times)
        yield from records(f"V={vocab_size}", name, seconds)
        del model


def records(shape: str, dtype: str, seconds: dict[str, list[float]]) -> Iterator[Record]:
    """Times and ratios as rows."""

    def row(impl: str, metric: str, unit: str, values: Sequence[float]) -> Record:
        return Record("step", impl, shape, dtype, metric, unit, *summarize(values))

    for impl, times in seconds.items():
        yield row(impl, "time", "s", times)
        yield row(impl, "time over authors'", "ratio", ratios(times, seconds["authors"]))
    yield row("ours", "time over floor", "ratio", ratios(seconds["ours"], seconds["floor"]))
    prior = [(a - b) / a for a, b in zip(seconds["ours"], seconds["ours, prior cached"], strict=True)]
    yield row("ours", "prior's share", "ratio", prior)
