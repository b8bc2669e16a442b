"""One micro-step, forward and backward: ours against the authors', trl's and the floor."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks import inputs, peers
from benchmarks.authors import authors_step, pad_pairs
from benchmarks.floors import StepFloor
from benchmarks.peers import Absent
from benchmarks.records import Record
from benchmarks.rounds import Run, interleave, ratios, summarize
from rmipo_lite.config import RMiPOConfig
from rmipo_lite.demo.data import load_tokenizer
from rmipo_lite.step import pair_values
from rmipo_lite.step.pair_step import PairStep
from rmipo_lite.tokens.pair import TokenizedPair

# (vocabulary, dtype) of the models measured by default
CASES = ((32000, "fp32"), (131072, "fp32"), (32000, "bf16"), (131072, "bf16"))
KEEPING_CASES = ((32000, "fp32"), (131072, "bf16"))  # with an allocator that keeps memory
PAIRS = 2  # in a micro-step
DRAWS, ROUNDS = 8, 1
GROWING_VOCABULARIES, GROWING_PAIRS = (32000, 65536, 131072, 262144), (1, 4, 16, 64)


def autocast(dtype: torch.dtype) -> Callable[[], AbstractContextManager[Any]]:
    """What the trainer wraps the model in: bf16 autocast for bf16 weights, nothing for fp32."""
    enabled = dtype == torch.bfloat16
    return lambda: torch.autocast("cpu", torch.bfloat16, enabled=enabled)


def pair_step(model: nn.Module, dtype: torch.dtype, folder: str, **options: Any) -> PairStep:
    """Our step as the trainer makes it."""
    options = {"sft_weight": 0.0, **options}  # nobody else's loss has the term
    args = RMiPOConfig(folder, use_cpu=True, bf16=dtype == torch.bfloat16, **options)
    return PairStep(model, args, max_tokens=10**9, packing=True, autocast=autocast(dtype))


def our_run(step: PairStep, pairs: Sequence[TokenizedPair]) -> Run:
    """Gradients dropped, then our step forward and backward; no optimizer, everybody's own."""

    def run() -> None:
        step.model.zero_grad(set_to_none=True)
        step.train(pairs, lambda loss: loss.backward())

    return run


def their_run(
    model: nn.Module,
    cast: Callable[[], AbstractContextManager[Any]],
    forward: Callable[[], torch.Tensor],
) -> Run:
    """The same of a step whose forward pass gives a loss."""

    def run() -> None:
        model.zero_grad(set_to_none=True)
        with cast():
            loss = forward()
        loss.backward()

    return run


class Contenders:
    """Everybody's step on one model: `runs(pairs)` binds them to a micro-step's pairs.

    A run drops the gradients, then goes forward and backward; no optimizer, which is everybody's
    own. Those that can't run here are in `absent`, with the reason.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, folder: str) -> None:
        self.model, self.cast = model, autocast(dtype)
        self.ours = pair_step(model, dtype, folder)
        self.cached = pair_step(model, dtype, folder, prior="cached")
        self.absent: dict[str, str] = {}
        self.trl: dict[str, Any] = {}
        tokenizer = load_tokenizer()
        makers: dict[str, Callable[[], Any]] = {
            "trl chunked head": lambda: peers.TrlChunkedStep(model),
            "trl SimPO": lambda: peers.TrlSimpoStep(model, tokenizer),
        }
        for name, make in makers.items():
            try:
                self.trl[name] = make()
            except Absent as reason:
                self.absent[name] = str(reason)

    def runs(self, pairs: Sequence[TokenizedPair]) -> dict[str, Run]:
        """Every contender on these pairs."""
        padded = pad_pairs(pairs)
        self.cached.prior_cache = self.cached.prior_means(pairs)
        return {
            "authors": self._padded(lambda: authors_step(self.model, padded).loss),
            **{name: self._padded(partial(step, padded)) for name, step in self.trl.items()},
            "ours": our_run(self.ours, pairs),
            "ours, prior cached": our_run(self.cached, pairs),
            "floor": StepFloor(self.model, pairs),
        }

    def _padded(self, forward: Callable[[], torch.Tensor]) -> Run:
        return their_run(self.model, self.cast, forward)


def bench(
    cases: Sequence[tuple[int, str]] = CASES,
    draws: int = DRAWS,
    rounds: int = ROUNDS,
    note: str = "",
) -> Iterator[Record]:
    """Rows of every case: seconds of each contender, its ratio to the authors', ours to the floor.

    Medians and quartiles are over draws x rounds. `note` joins the shape, for an unusual setting.
    """
    for vocab_size, name in cases:
        dtype = inputs.DTYPES[name]
        model = inputs.lora_llama(vocab_size, dtype)
        seconds: dict[str, list[float]] = {}
        with tempfile.TemporaryDirectory() as folder:
            contenders = Contenders(model, dtype, folder)
            for seed in range(draws):
                runs = contenders.runs(inputs.draw_pairs(PAIRS, vocab_size, seed))
                for who, times in interleave(runs, rounds, seed=seed).items():
                    seconds.setdefault(who, []).extend(times)
        shape = f"V={vocab_size} 2 pairs{note}"
        yield from _records(shape, name, seconds)
        for impl, reason in contenders.absent.items():
            yield Record("step", impl, shape, name, "time", "s", f"absent: {reason}")
        del model, contenders


def _records(shape: str, dtype: str, seconds: dict[str, list[float]]) -> Iterator[Record]:
    def row(impl: str, metric: str, unit: str, values: Sequence[float]) -> Record:
        return Record("step", impl, shape, dtype, metric, unit, *summarize(values))

    ours, authors = seconds["ours"], seconds["authors"]
    for impl, times in seconds.items():
        yield row(impl, "time", "s", times)
        if impl != "authors":
            yield row(impl, "time over authors'", "ratio", ratios(times, authors))
        if impl.startswith("trl"):
            yield row("ours", f"time over {impl}", "ratio", ratios(ours, times))
    yield row("ours", "time over floor", "ratio", ratios(ours, seconds["floor"]))
    cached = seconds["ours, prior cached"]
    share = [(a - b) / a for a, b in zip(ours, cached, strict=True)]
    yield row("ours", "prior's share", "ratio", share)


def bench_growth(rounds: int = 3) -> Iterator[Record]:
    """How our step grows: with the vocabulary at 2 pairs, and with the pairs at 32k words."""
    shapes = [(v, PAIRS) for v in GROWING_VOCABULARIES] + [(32000, n) for n in GROWING_PAIRS]
    for vocab_size, count in shapes:
        model = inputs.lora_llama(vocab_size, torch.float32)
        pairs = inputs.draw_pairs(count, vocab_size, seed=0)
        with tempfile.TemporaryDirectory() as folder:
            step = pair_step(model, torch.float32, folder)
            step.max_tokens = 4096  # what "auto" takes on a CPU with memory to spare
            seconds = interleave({"ours": our_run(step, pairs)}, rounds)["ours"]
        tokens = step.train(pairs, lambda loss: loss.backward()).num_tokens
        shape = f"V={vocab_size} {count} pairs"
        per_token = [s / tokens * 1e3 for s in seconds]
        yield Record("step", "ours", shape, "fp32", "growth: time", "s", *summarize(seconds))
        yield Record(
            "step", "ours", shape, "fp32", "growth: time per token", "ms", *summarize(per_token)
        )


def bench_overhead(rounds: int = 9) -> Iterator[Record]:
    """Share of a step of about 1k tokens that is neither model, head nor backward pass."""
    model = inputs.lora_llama(32000, torch.float32)
    pairs = inputs.pairs_of_tokens(1000, 32000)
    shares = []
    with tempfile.TemporaryDirectory() as folder:
        step = pair_step(model, torch.float32, folder)
        for index in range(-1, rounds):
            model.zero_grad(set_to_none=True)
            inside = _Stopwatch()
            watched = _watched(step, inside)
            start = time.perf_counter()
            outcome = watched.train(pairs, inside(lambda loss: loss.backward()))
            pair_values.reduce(
                outcome.values, step.args
            )  # once per log line in a run, here every step
            total = time.perf_counter() - start
            if index >= 0:
                shares.append(1 - inside.seconds / total)
    shape = f"V=32000 {outcome.num_tokens} tokens"
    summary = summarize(shares)
    yield Record("step", "ours", shape, "fp32", "outside model and operators", "ratio", *summary)


class _Stopwatch:
    """Sums the time spent in the functions it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


def _watched(step: PairStep, inside: _Stopwatch) -> PairStep:
    """A copy of the step whose model and head run under the stopwatch."""
    copy = PairStep(step.model, step.args, step.max_tokens, step.packing, autocast=step.autocast)
    copy._score = inside(copy._score)  # type: ignore[method-assign]
    return copy
