"""Every method on the demo's task, judged by its true reward: one call of `rmipo_lite.compare`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

import rmipo_lite
from benchmarks.records import Record
from rmipo_lite.demo import MODEL, load_rows
from rmipo_lite.demo.scoring import judge
from rmipo_lite.output.console import say

_MEASURES = ("win_rate", "accuracy", "chosen_moved", "length", "unended", "repetition")
_OPTIONS: dict[str, Any] = {
    "per_device_train_batch_size": 16, "max_steps": 60, "save_strategy": "no",
    "max_new_tokens": 64, "prompts": 200,
}  # fmt: skip


def bench(*, quick: bool = False) -> Iterator[Record]:
    """Means over seeds; low and high are a standard error below and above."""
    methods: Any = ["rmipo", "dpo"] if quick else "all"
    seeds = [0] if quick else [0, 1]
    options = {**_OPTIONS, "max_steps": 2, "learning_rate": 1e-3} if quick else _OPTIONS
    with tempfile.TemporaryDirectory() as folder:
        found = rmipo_lite.compare(
            str(MODEL), load_rows(), methods, seeds=seeds, judge=judge,
            output_dir=f"{folder}/runs", **options,
        )  # fmt: skip
    say(str(found))
    shape = f"demo's pairs, {options['max_steps']} steps of 16, {len(seeds)} seeds"
    first = found.methods[0]
    for method in found.methods:
        numbers = {measure: found.mean(method, measure) for measure in _MEASURES}
        if method != first:
            numbers[f"win_rate less {first}"] = found.difference(method, first, "win_rate")
        for name, (mean, error) in numbers.items():
            yield Record(
                "compare", method, shape, "float32", name, "", mean, mean - error, mean + error
            )
        for name, values in (
            ("learning rate", [one.learning_rate or 0.0 for one in found.of(method)]),
            ("seconds", [one.seconds for one in found.of(method)]),
        ):
            middle = sum(values) / len(values)
            yield Record(
                "compare", method, shape, "float32", name, "", middle, min(values), max(values)
            )
