"""Runs of the study in processes of their own, a row of claims.csv each, none made twice."""

from __future__ import annotations

import contextlib
import csv
import datetime
import functools
import importlib
import io
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.claims.cells import LOSSES, Cell
from benchmarks.records import device_name
from rmipo_lite import run
from rmipo_lite.planning.range_test import RangeTest
from rmipo_lite.system.processes import cores
from rmipo_lite.training import learning_rate
from rmipo_lite.version import __version__

SAMPLES = 2  # answers to each held-out prompt
NUMBERS = (
    "found rate", "reward", "reward before", "win rate", "unended", "empty",
    "garbled", "tokens", "tokens before", "chosen tokens", "accuracy", "accuracy before",
    "chosen logps", "chosen logps before", "rejected logps", "rejected logps before", "margin",
    "margin before", "effective sample", "seconds",
)  # fmt: skip
_WHERE = ("device", "torch", "version", "date")
KEYS = tuple(f.name for f in fields(Cell))


def run_all(
    path: Path, cells: Iterable[Cell], world: ModuleType, workers: int = 0
) -> Iterator[str]:
    """Make every run that has no row yet; yields a line for people after each."""
    rows = read(path)
    there = {tuple(row[key] for key in KEYS) for row in with_twins(rows)}
    cells = [cell for cell in dict.fromkeys(cells) if cell.key not in there]
    yield f"{len(rows)} rows are there, {len(cells)} runs to make"
    with ProcessPoolExecutor(
        max_workers=workers or cores(),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(1,),
    ) as pool:
        waiting: dict[Future[dict[str, Any]], Cell] = {}
        left = iter(cells)
        for cell in left:
            waiting[pool.submit(run_cell, cell, world.__name__)] = cell
        for done in as_completed(waiting):
            row = done.result()
            _append(path, row)
            yield " ".join(str(row[name]) for name in (*KEYS, "reward", "win rate", "seconds"))


def read(path: Path) -> list[dict[str, str]]:
    """The rows so far."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def with_twins(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """A run in which nothing was weighed is that without balance too."""
    there = {tuple(row[key] for key in KEYS) for row in rows}
    twins = [{**row, "balance": "off"} for row in rows if float(row["effective sample"]) == 1.0]
    return rows + [row for row in twins if tuple(row[key] for key in KEYS) not in there]


def _append(path: Path, row: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*KEYS, *NUMBERS, *_WHERE], lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})


def run_cell(cell: Cell, world_name: str) -> dict[str, Any]:
    """Train, let it answer the held-out prompts before and after, and count."""
    world = importlib.import_module(world_name)
    start = time.perf_counter()
    quiet = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(quiet),
        contextlib.redirect_stderr(quiet),
        _search_from(cell.rate),
    ):
        result = run.train(
            world.MODEL, world.TASKS[cell.task](), output_dir=Path(folder) / "run", seed=cell.seed,
            **_options(cell),
        )  # fmt: skip
        asked = world.questions()
        if cell.seed not in _BEFORE:  # one start model for every run of a world
            with result.adapter_off():
                _BEFORE[cell.seed] = _answers(world, result, cell.seed)
        before, after = _BEFORE[cell.seed], _answers(world, result, cell.seed)
    rewards = [
        [_rewards(cell.task, world, asked, some) for some in both] for both in (before, after)
    ]
    numbers = {
        "found rate": result.learning_rate or "",
        "reward": _mean(rewards[1]),
        "reward before": _mean(rewards[0]),
        "win rate": _wins(rewards[1], rewards[0]),
        **_of_answers(world, asked, after),
        "tokens before": statistics.mean(a.tokens for some in before for a in some),
        "chosen tokens": result.metrics["eval_lengths/chosen"],
        "effective sample": _effective(result),
        "seconds": time.perf_counter() - start,
    }
    for name, key in (
        ("accuracy", "eval_rewards/accuracies"),
        ("chosen logps", "eval_logps/chosen"),
        ("rejected logps", "eval_logps/rejected"),
        ("margin", "eval_rewards/margins"),
    ):
        numbers[name] = result.metrics[key]
        numbers[f"{name} before"] = result.metrics_before[key]
    row = dict(zip(KEYS, cell.key, strict=True)) | numbers
    return row | {
        "device": device_name(), "torch": torch.__version__, "version": __version__,
        "date": datetime.date.today().isoformat(),
    }  # fmt: skip


_BEFORE: dict[int, list[list[Any]]] = {}  # by seed; a process makes runs of one world


def _answers(world: Any, result: Any, seed: int) -> list[list[Any]]:
    """`SAMPLES` answers to each held-out prompt, drawn together."""
    asked = world.questions()
    given = world.sample(result.model, result.tokenizer, asked * SAMPLES, seed)
    return [given[start : start + len(asked)] for start in range(0, len(given), len(asked))]


def _options(cell: Cell) -> dict[str, Any]:
    from peft import LoraConfig

    return {
        **LOSSES[cell.loss],
        "learning_rate": "auto" if cell.rate.startswith("auto") else float(cell.rate),
        "length_balance": cell.balance,
        "end_anchor": cell.anchor,
        "sft_weight": cell.sft,
        "max_steps": cell.steps,
        "per_device_train_batch_size": cell.batch,
        "peft_config": LoraConfig(
            r=cell.rank, lora_alpha=2 * cell.rank, target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
        "save_strategy": "no", "sample_prompts": 0, "eval_completions": 0, "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
    }  # fmt: skip


def _search_from(rate: str) -> contextlib.AbstractContextManager[object]:
    """Let the search begin elsewhere: "auto from 1e-05"."""
    if not rate.startswith("auto from "):
        return contextlib.nullcontext()
    first = float(rate.removeprefix("auto from "))
    return patch.object(learning_rate, "RangeTest", functools.partial(RangeTest, rate=first))


def _rewards(task: str, world: Any, asked: Sequence[Any], answers: Sequence[Any]) -> list[float]:
    return [world.reward(task, q, a) for q, a in zip(asked, answers, strict=True)]


def _mean(rewards: list[list[float]]) -> float:
    return statistics.mean(value for some in rewards for value in some)


def _wins(after: list[list[float]], before: list[list[float]]) -> float:
    """Share of answers that earn more than one of before, drawn with another seed; ties half."""
    others = [*before[1:], before[0]]
    return statistics.mean(
        (now > then) + 0.5 * (now == then)
        for some, other in zip(after, others, strict=True)
        for now, then in zip(some, other, strict=True)
    )


def _of_answers(world: Any, asked: Sequence[Any], drawn: list[list[Any]]) -> dict[str, float]:
    pairs = [(q, a) for answers in drawn for q, a in zip(asked, answers, strict=True)]
    shares = {
        "unended": [not a.ended for _, a in pairs],
        "empty": [a.ended and not a.text.strip() for _, a in pairs],
        "garbled": [world.is_garbled(q, a) for q, a in pairs],
        "tokens": [a.tokens for _, a in pairs],
    }
    return {name: statistics.mean(map(float, values)) for name, values in shares.items()}


def _effective(result: Any) -> float:
    balance = result.data_report.length_balance
    return balance.effective if balance is not None and balance.is_used else 1.0
