"""What a prior that isn't scored at every step costs: gamma's distance from that of the live one.

Of every pair that a run trains on, under the weights of its own step: the gamma that the step used,
against the one that the prior of those weights gives.
"""

from __future__ import annotations

import contextlib
import io
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.merge import short_rows
from benchmarks.records import Record
from rmipo_lite import run
from rmipo_lite.config import RMiPOConfig
from rmipo_lite.demo.data import MODEL, PAIRS
from rmipo_lite.model.names import short_name
from rmipo_lite.ops import rmipo_loss
from rmipo_lite.step.losses import SideMeans
from rmipo_lite.step.pair_step import PairStep
from rmipo_lite.step.pair_values import PairValues

RATES = (1e-4, 3e-4, 1e-3)
PRIORS = ("cached", "refresh:31")
STEPS, BATCH, EPOCH = 90, 16, 30  # steps of an epoch, so that every pair comes three times


def bench(
    model: Path = MODEL,
    pairs: Path = PAIRS,
    rates: tuple[float, ...] = RATES,
    steps: int = STEPS,
    batch: int = BATCH,
    epoch: int = EPOCH,
    priors: tuple[str, ...] = PRIORS,
) -> Iterator[Record]:
    """Rows of every rate and prior: the mean over a run's pairs, and over those of its last epoch.

    The rows of a larger model are of 30 steps of 8 pairs, 10 an epoch, and of refresh:11.
    """
    records = short_rows(pairs, epoch * batch)
    for rate in rates:
        for prior in priors:
            found = _distances(model, records, prior, rate, steps, batch)
            shape = f"{short_name(str(model))}, rate {rate:g}, {steps} steps of {batch}"
            for metric, value in (
                ("distance from the live gamma", statistics.mean(found)),
                (f"the same in the last {epoch} steps", statistics.mean(found[-epoch * batch :])),
            ):
                yield Record("drift", prior, shape, "fp32", metric, "", value)


def _distances(
    model: Path, rows: list[dict[str, Any]], prior: str, rate: float, steps: int, batch: int
) -> list[float]:
    """Of every trained pair, in the order of training."""
    found: list[float] = []
    train = PairStep.train

    def measured(self: PairStep, pairs: Any, backward: Any) -> Any:
        live = self.prior_means(pairs)
        outcome = train(self, pairs, backward)
        rows = iter(outcome.rows)
        for values in outcome.values:
            found.extend(_distance(values, [next(rows) for _ in values.loss], live, self.args))
        return outcome

    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        patch.object(PairStep, "train", measured),
    ):
        run.train(
            str(model), rows, output_dir=Path(folder) / "run", prior=prior, learning_rate=rate,
            max_steps=steps, per_device_train_batch_size=batch, eval_strategy="no",
            eval_dataset=rows[:2],  # or some of the pairs would be held out
            save_strategy="no", eval_completions=0, sample_prompts=0, use_cpu=True,
        )  # fmt: skip
    return found


def _distance(
    values: PairValues, rows: list[int], live: SideMeans, args: RMiPOConfig
) -> list[float]:
    sides = torch.tensor([live[row] for row in rows]).T
    wanted: Tensor = rmipo_loss(
        values.chosen_logps, values.rejected_logps, *sides, beta=args.beta or 2.0,
        gamma_min=args.gamma_min, gamma_max=args.gamma_max,
    ).gamma  # fmt: skip
    away = (values.gamma - wanted).abs()
    return [float(distance) for distance in away if not distance.isnan()]
