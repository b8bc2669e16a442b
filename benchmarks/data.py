"""Preparing rows: template, tokenise, report; rows per second, against trl's preparation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks import peers
from benchmarks.peers import Absent
from benchmarks.records import Record
from benchmarks.rounds import Run, interleave, ratios, summarize
from rmipo_lite.data.rows import load_rows
from rmipo_lite.demo.data import MODEL, PAIRS
from rmipo_lite.tokens.options import TokenizationOptions
from rmipo_lite.tokens.tokenize_rows import tokenize_rows

ROUNDS = 3


def bench(pairs: Path = PAIRS, tokenizer: Path = MODEL, rounds: int = ROUNDS) -> Iterator[Record]:
    """Rows per second of both from rows in memory to token ids, one process each."""
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    rows = _records(pairs)
    shape = f"{pairs.name} {len(rows)} rows, {tokenizer.name}"
    running: dict[str, Run] = {"ours": lambda: _ours(rows, loaded)}
    try:
        running["trl"] = _trl(rows, loaded)
    except Absent as reason:
        yield Record("data", "trl", shape, "", "rows per second", "1/s", f"absent: {reason}")
    seconds = interleave(running, rounds)
    for impl, times in seconds.items():
        speed = summarize([len(rows) / time for time in times])
        yield Record("data", impl, shape, "", "rows per second", "1/s", *speed)
    if "trl" in seconds:
        over = summarize(ratios(seconds["trl"], seconds["ours"]))
        yield Record("data", "ours", shape, "", "rows per second over trl", "ratio", *over)


def _records(path: Path) -> list[dict[str, Any]]:
    """The rows that both are given: what ours keeps, in trl's form."""
    rows, _ = load_rows(str(path))
    return [{"prompt": r.prompt, "chosen": r.chosen, "rejected": r.rejected} for r in rows]


def _ours(records: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> None:
    rows, report = load_rows(records)
    tokenize_rows(rows, tokenizer, TokenizationOptions(), report)
    str(report)


def _trl(records: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> Run:
    """DPOTrainer's preparation alone: it needs nothing else of its trainer."""
    trainer = peers.module("trl.trainer.dpo_trainer").DPOTrainer
    datasets = peers.module("datasets")
    prepare: Callable[..., Any] = trainer._prepare_dataset
    args = SimpleNamespace(dataset_num_proc=None, max_length=1024, truncation_mode="keep_start")
    dataset = datasets.Dataset.from_list(records)
    holder = SimpleNamespace(_tokenizer=tokenizer)

    def run() -> None:
        datasets.disable_caching()
        datasets.disable_progress_bars()
        try:
            prepare(holder, dataset, tokenizer, args, "train")
        finally:
            datasets.enable_caching()
            datasets.enable_progress_bars()

    return run
