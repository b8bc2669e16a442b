"""A DPO micro-step beside trl's DPOTrainer: time in one interleaved run, memory in processes apart.

With the reference computed in the step, as trl's default has it, and with its sums known, as ours
(which scores every pair once before training).
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import nn

from benchmarks import inputs
from benchmarks.authors import pad_pairs
from benchmarks.child import ask
from benchmarks.memory import peak_of
from benchmarks.peers import TrlDpoStep
from benchmarks.records import Record
from benchmarks.rounds import Run, interleave, ratios, summarize
from benchmarks.step import PAIRS, our_run, pair_step, their_run
from rmipo_lite.adapters.start import trained_weights
from rmipo_lite.demo.data import load_tokenizer
from rmipo_lite.step.reference import Reference
from rmipo_lite.tokens.pair import TokenizedPair

VOCABULARY, DRAWS = 131072, 3
CONTENDERS = ("trl", "trl, reference known", "ours, reference live", "ours, reference known")
_AGAINST = {
    "ours, reference live": "trl", "ours, reference known": "trl, reference known",
}  # fmt: skip
_LIMIT_S = 900


def bench(*, draws: int = DRAWS, vocab_size: int = VOCABULARY) -> Iterator[Record]:
    """Seconds and peaks of each, and ours over trl's of the same kind, draw by draw."""
    shape = f"V={vocab_size} {PAIRS} pairs"
    model = inputs.lora_llama(vocab_size, torch.float32)
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        contenders = Contenders(model, folder)
        for seed in range(draws):
            pairs = inputs.draw_pairs(PAIRS, vocab_size, seed)
            runs = {name: contenders.run(name, pairs) for name in CONTENDERS}
            for who, times in interleave(runs, 1, seed=seed).items():
                seconds.setdefault(who, []).extend(times)
    del model
    yield from _records(shape, "time", "s", seconds)
    peaks = {
        name: [value / 2**20 for value in ask(__name__, [name, vocab_size, draws], name, _LIMIT_S)]
        for name in CONTENDERS
    }
    yield from _records(shape, "peak above base", "MiB", peaks)


def _records(
    shape: str, metric: str, unit: str, values: dict[str, list[float]]
) -> Iterator[Record]:
    for name, own in values.items():
        yield Record("dpo", name, shape, "fp32", metric, unit, *summarize(own))
        if name in _AGAINST:
            over = summarize(ratios(own, values[_AGAINST[name]]))
            yield Record("dpo", name, shape, "fp32", f"{metric} over trl's", "ratio", *over)


class Contenders:
    """Everybody's step on one model; `run` binds one of them to a micro-step's pairs."""

    def __init__(self, model: nn.Module, folder: str, *, with_trl: bool = True) -> None:
        self._model, start, self._ours = model, trained_weights(model), {}
        for is_known in (True, False):
            step = pair_step(model, torch.float32, folder, loss_type="dpo")
            step.reference = Reference(step, start, is_live=not is_known)
            self._ours[is_known] = step
        # After our options, which begin accelerate's state anew.
        self._trl = TrlDpoStep(model, load_tokenizer()) if with_trl else None

    def run(self, name: str, pairs: Sequence[TokenizedPair]) -> Run:
        """Gradients dropped, forward and backward; no optimizer."""
        model, is_known = self._model, name.endswith("known")
        if name.startswith("trl"):
            assert self._trl is not None
            forward = partial(self._trl, pad_pairs(pairs), is_known=is_known)
            return their_run(model, nullcontext, forward)
        step = self._ours[is_known]
        assert step.reference is not None
        step.reference.know(pairs)
        return our_run(step, pairs)


# ---- in the child ------------------------------------------------------------------------------


def _peaks(name: str, vocab_size: int, draws: int) -> list[int]:
    model, found = inputs.lora_llama(vocab_size, torch.float32), []
    with tempfile.TemporaryDirectory() as folder:
        contenders = Contenders(model, folder, with_trl=name.startswith("trl"))
        # A tiny step first: what is loaded at first use isn't a step's.
        contenders.run(name, [inputs.tiny_pair(vocab_size)])()
        for seed in range(draws):
            step = contenders.run(name, inputs.draw_pairs(PAIRS, vocab_size, seed))
            model.zero_grad(set_to_none=True)
            found.append(peak_of(step))
    return found


if __name__ == "__main__":
    print(json.dumps(_peaks(*json.loads(sys.argv[1]))))  # noqa: T201
