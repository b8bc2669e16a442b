"""A short run of the demo's model, of which several tests look at what it left."""

from __future__ import annotations

import json
from typing import Any

import pytest

import rmipo_lite
from rmipo_lite import demo


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    rows, place = demo.load_rows(), tmp_path_factory.mktemp("somebody")
    (place / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:64]))
    return rmipo_lite.train(
        str(demo.MODEL), str(place / "pairs.jsonl"), eval_dataset=rows[64:96], learning_rate=3e-3,
        max_steps=4, output_dir=place / "out", logging_steps=2, use_cpu=True,
        per_device_train_batch_size=8, eval_completions=0, sample_prompts=0,
    )  # fmt: skip
