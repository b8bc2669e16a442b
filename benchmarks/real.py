"""A real model on real pairs: whole micro-steps beside trl's SimPO and DPO, on this CPU.

Wall time and CPU seconds are of one interleaved run, every contender on the same pairs; the peak is
that of a process of its own, above weights and libraries.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import inputs, peers
from benchmarks.authors import pad_pairs
from benchmarks.child import ask
from benchmarks.memory import peak_of
from benchmarks.records import Record
from benchmarks.rounds import Run, interleave_clocks, ratios, summarize
from benchmarks.step import autocast, our_run, pair_step, their_run
from rmipo_lite.adapters.attach import attach_adapter
from rmipo_lite.config import RMiPOConfig
from rmipo_lite.data.rows import load_rows
from rmipo_lite.model.backbone import disable_dropout
from rmipo_lite.model.loading import load_config
from rmipo_lite.model.names import short_name
from rmipo_lite.tokens.pair import TokenizedPair
from rmipo_lite.tokens.prepare import prepare
from rmipo_lite.tokens.templates import prepare_tokenizer

ROUNDS = 6
OURS = ("ours", "ours, prior cached", "ours, simpo")
THEIRS = ("trl SimPO", "trl DPO")
_AGAINST = "trl SimPO"
_LIMIT_S = 1800


class Lengths(NamedTuple):
    """Which pairs, by the tokens of a prompt and one response, and how many in a micro-step."""

    name: str
    shortest: int
    longest: int
    pairs: int


CASES = (Lengths("up to 512 tokens", 1, 512, 4), Lengths("24 to 150 tokens", 24, 150, 2))


def bench(model: Path, pairs: Path, dtype: str = "fp32", rounds: int = ROUNDS) -> Iterator[Record]:
    """Rows of every case: seconds, CPU seconds and peaks of each, and over trl's SimPO."""
    for number, case in enumerate(CASES):
        shape = f"{short_name(str(model))}, {case.pairs} pairs {case.name}"
        # Before a model is loaded here: theirs may want all the memory that there is.
        peaks = {
            name: [
                value / 2**20
                for value in ask(
                    __name__,
                    [name, str(model), str(pairs), dtype, number, max(1, rounds // 3)],
                    f"memory of {name}",
                    _LIMIT_S,
                )
            ]
            for name in (*OURS, *THEIRS)
        }
        yield from _records(shape, dtype, "peak above weights", "MiB", peaks)
        draws = _draws(model, pairs, case, rounds)
        yield from counted(model, draws, shape, dtype)
        with tempfile.TemporaryDirectory() as folder:
            contenders = Contenders(model, dtype, folder)
            wall, cpu = _timed(contenders, draws)
        del contenders
        for metric, found in (("time", wall), ("CPU time", cpu)):
            yield from _records(shape, dtype, metric, "s", found)
            own, cached = found["ours"], found["ours, prior cached"]
            share = summarize([1 - b / a for a, b in zip(own, cached, strict=True)])
            metric = f"prior's share of {metric}"
            yield Record("real", "ours", shape, dtype, metric, "ratio", *share)


def counted(
    model: Path, draws: Sequence[Sequence[TokenizedPair]], shape: str, dtype: str
) -> Iterator[Record]:
    """Products of each step over those of trl's SimPO: what the same speed would give.

    Forward and backward pass of the frozen layers, of the head forward and for the gradient; theirs
    of every token of rows as long as the longest. Attention and what moves memory aren't counted.
    """
    config = load_config(str(model))
    with torch.device("meta"):
        layers = AutoModelForCausalLM.from_config(config).get_decoder().layers.parameters()
    body = sum(weight.numel() for weight in layers)
    head = config.get_text_config().vocab_size * config.get_text_config().hidden_size
    found: dict[str, list[float]] = {name: [] for name in OURS}
    shares = []
    for pairs in draws:
        longest = max(len(p.prompt_ids) + max(map(len, _sides(p))) for p in pairs)
        responses = sum(len(ids) for p in pairs for ids in _sides(p))
        read = responses + sum(len(p.prompt_ids) - 2 for p in pairs)
        theirs = 2 * len(pairs) * longest * 2 * (body + head)
        simpo, prior = 2 * (read * body + responses * head), responses * (body + head)
        for name, products in zip(OURS, (simpo + prior, simpo, simpo), strict=True):
            found[name].append(products / theirs)
        shares.append(prior / (simpo + prior))
    for name, values in found.items():
        metric = f"products over {_AGAINST}'s, counted"
        yield Record("real", name, shape, dtype, metric, "ratio", *summarize(values))
    metric = "prior's share of products, counted"
    yield Record("real", "ours", shape, dtype, metric, "ratio", *summarize(shares))


def _sides(pair: TokenizedPair) -> tuple[list[int], list[int]]:
    """Both responses."""
    return pair.chosen_ids, pair.rejected_ids


def _timed(
    contenders: Contenders, draws: Sequence[Sequence[TokenizedPair]]
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    wall: dict[str, list[float]] = {}
    cpu: dict[str, list[float]] = {}
    for number, drawn in enumerate(draws):
        found = interleave_clocks(contenders.runs(drawn), 1, seed=number, warm=not number)
        for all_times, times in zip((wall, cpu), found, strict=True):
            for name, values in times.items():
                all_times.setdefault(name, []).extend(values)
    return wall, cpu


def _records(
    shape: str, dtype: str, metric: str, unit: str, found: dict[str, list[float]]
) -> Iterator[Record]:
    for name, values in found.items():
        yield Record("real", name, shape, dtype, metric, unit, *summarize(values))
        if name in OURS:
            over = summarize(ratios(values, found[_AGAINST]))
            metric_over = f"{metric} over {_AGAINST}'s"
            yield Record("real", name, shape, dtype, metric_over, "ratio", *over)


def _draws(model: Path, pairs: Path, case: Lengths, rounds: int) -> list[list[TokenizedPair]]:
    """Pairs of the file in the case's lengths, so many for every round."""
    tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(model), chat_template="plain")
    args = RMiPOConfig("unused", use_cpu=True, max_length=case.longest)
    ready = prepare(load_rows(str(pairs)), tokenizer, args, load_config(str(model)))

    def fits(pair: TokenizedPair) -> bool:
        sides = [len(pair.prompt_ids) + len(ids) for ids in (pair.chosen_ids, pair.rejected_ids)]
        return case.shortest <= min(sides) and max(sides) < case.longest

    fitting = [pair for pair in ready.pairs if fits(pair)]
    random.Random(0).shuffle(fitting)
    return [fitting[n * case.pairs : (n + 1) * case.pairs] for n in range(rounds)]


class Contenders:
    """Everybody's micro-step on one model with LoRA r=16; no optimizer.

    Made after all options of ours, each of which begins accelerate's state anew.
    """

    def __init__(self, model: Path, dtype: str, folder: str) -> None:
        kind = inputs.DTYPES[dtype]
        torch.manual_seed(0)
        self.model: Any = attach_adapter(
            AutoModelForCausalLM.from_pretrained(model, dtype=kind, attn_implementation="sdpa"),
            "new",
        )
        disable_dropout(self.model)
        self.model.train()
        self._cast = autocast(kind)
        self._ours = {
            "ours": pair_step(self.model, kind, folder),
            "ours, prior cached": pair_step(self.model, kind, folder, prior="cached"),
            "ours, simpo": pair_step(self.model, kind, folder, loss_type="simpo"),
        }
        tokenizer = AutoTokenizer.from_pretrained(model)
        # trl's last, for the same reason.
        self._simpo = peers.TrlSimpoStep(self.model, tokenizer)
        self._dpo = peers.TrlDpoStep(self.model, tokenizer)

    def runs(self, pairs: Sequence[TokenizedPair]) -> dict[str, Run]:
        """Every contender's step on these pairs."""
        padded = pad_pairs(pairs)
        cached = self._ours["ours, prior cached"]
        cached.prior_cache = cached.prior_means(pairs)

        return {
            **{name: our_run(self._ours[name], pairs) for name in OURS},
            "trl SimPO": their_run(self.model, self._cast, lambda: self._simpo(padded)),
            "trl DPO": their_run(self.model, self._cast, lambda: self._dpo(padded, is_known=False)),
        }


# ---- in the child ------------------------------------------------------------------------------


def _peaks(name: str, model: str, pairs: str, dtype: str, case: int, rounds: int) -> list[int]:
    draws = _draws(Path(model), Path(pairs), CASES[case], rounds)
    with tempfile.TemporaryDirectory() as folder:
        contenders, found = Contenders(Path(model), dtype, folder), []
        tiny = TokenizedPair(0, [9] * 4, [5] * 4, [6] * 3)
        contenders.runs([tiny])[name]()  # what is loaded at first use isn't a step's
        for drawn in draws:
            run = contenders.runs(drawn)[name]
            contenders.model.zero_grad(set_to_none=True)
            found.append(peak_of(run))
    return found


if __name__ == "__main__":
    print(json.dumps(_peaks(*json.loads(sys.argv[1]))))  # noqa: T201
