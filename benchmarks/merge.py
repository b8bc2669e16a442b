"""Merging an adapter of 4-bit weights: how far each way is from what was trained.

KL of the next token and share of equal likeliest tokens, on the run's held-out prompts.
"""

from __future__ import annotations

import contextlib
import copy
import io
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from benchmarks.records import Record
from rmipo_lite import run
from rmipo_lite.adapters.merge import merged_copy
from rmipo_lite.data.rows import load_rows
from rmipo_lite.demo.data import MODEL, PAIRS
from rmipo_lite.model.generation import prompt_ids
from rmipo_lite.model.loading import load_model
from rmipo_lite.model.names import short_name
from rmipo_lite.results.agreement import agreement
from rmipo_lite.results.result import TrainResult

STEPS = 12
_MOST = 200  # pairs
_LONGEST = 260  # characters of a text: four-bit products are slow on a CPU


def bench(model: Path = MODEL, pairs: Path = PAIRS, steps: int = STEPS) -> Iterator[Record]:
    """Rows of every way, of one run of the model on short pairs of a file."""
    records = short_rows(pairs, _MOST)
    shape = f"{short_name(str(model))}, NF4, {steps} steps"
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.redirect_stdout(io.StringIO()):
            result = _trained(model, records, Path(folder) / "run", steps)
        texts = [
            prompt_ids(result.tokenizer, prompt, conversational=result.conversational)
            for prompt in result.held_out_prompts
        ]
        for way, merged in _ways(result, str(model)).items():
            found = agreement(result.model, merged(), texts)
            assert found is not None
            yield Record("merge", way, shape, "", "KL", "nats per token", found.kl)
            yield Record("merge", way, shape, "", "same likeliest", "share", found.top1)


def short_rows(pairs: Path, most: int) -> list[dict[str, Any]]:
    """The first so many rows of a file whose texts are short, as `train` takes them."""
    rows = [(row.prompt, row.chosen, row.rejected) for row in load_rows(str(pairs)).rows]
    short = [texts for texts in rows if max(len(str(text)) for text in texts) < _LONGEST]
    return [
        dict(zip(("prompt", "chosen", "rejected"), texts, strict=True)) for texts in short[:most]
    ]


def _trained(model: Path, rows: list[Any], folder: Path, steps: int) -> TrainResult:
    return run.train(
        str(model), rows, quantization="4bit", output_dir=folder, max_steps=steps,
        per_device_train_batch_size=4, learning_rate=3e-4, save_strategy="no",
        eval_completions=0, sample_prompts=0, use_cpu=True,
    )  # fmt: skip


def _ways(result: TrainResult, model: str) -> dict[str, Callable[[], Any]]:
    adapted: PeftModel = result.model

    def into_original() -> Any:
        plain = load_model(model, result.args)
        return PeftModel.from_pretrained(plain, str(result.output_dir)).merge_and_unload()

    def without() -> Any:
        return copy.deepcopy(adapted).unload()

    return {
        "dequantised fp32": lambda: merged_copy(adapted, torch.float32),
        "bf16, run in fp32": lambda: merged_copy(adapted, torch.bfloat16).float(),
        "dequantised bf16": lambda: merged_copy(adapted, torch.bfloat16),
        "rounded to NF4 again": lambda: copy.deepcopy(adapted).merge_and_unload(),
        "into the original": into_original,
        "without the adapter": without,
    }
