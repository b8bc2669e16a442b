"""The same seed gives the same bits, with one thread and with two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rmipo_lite.ops import native, reference
from tests.kit import (
    equal_weights,
    logged_losses,
    random_pairs,
    tiny_model,
    tiny_trainer,
    trained_weights,
)
from tests.trials.numbers.operands import kernel_impl, random_head, seeded
from tests.trials.scorecard import Check, Trial, Trials, expect, threads


def same_bits(trials: Trials) -> None:
    """Check 24: twice with one thread and twice with two, the same bits both times.

    Between one thread and two the kernels' own work is the same too. A matrix product is not: BLAS
    splits a long sum among its threads, and gradients differ by a rounding.
    """
    kinds = (_same_head, _same_rows, _same_training)
    for trial in trials:
        with trial:
            kinds[trial.index % 3](trial)


def _twice(run: Callable[[int], dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """What `run` gives with one thread and with two, each the same bits twice."""
    results = []
    for place, count in enumerate((1, 1, 2, 2)):
        with threads(count):
            results.append(run(place))
    for first, second, text in ((0, 1, "one thread"), (2, 3, "two threads")):
        expect(equal_weights(results[first], results[second]), f"two runs with {text} differ")
    return [results[0], results[2]]


def _same_head(trial: Trial) -> None:
    case = random_head(trial.rng)
    if trial.rng.random() < 0.5:  # large enough for BLAS to share the work
        generator = seeded(trial.rng)
        case.hidden = torch.randn(300, 128, generator=generator)
        case.weight = torch.randn(12_000, 128, generator=generator) / 10
        case.target_ids = torch.randint(0, 12_000, (300,), generator=generator)
        case.bias = None
    trial.tried = str(case)

    def run(_place: int) -> dict[str, Tensor]:
        leaves = case.leaves()
        logps = case.logps(*leaves)
        if case.mode != "value":
            logps.sum().backward()
        named = zip("hwb", leaves, strict=True)
        grads = {n: x.grad for n, x in named if x is not None and x.grad is not None}
        return {"logps": logps.detach(), **grads}

    _twice(run)


def _same_rows(trial: Trial) -> None:
    rows, vocab = trial.rng.choice(((300, 5003), (7, 40_000), (1, 1)))
    dtype = trial.rng.choice((torch.float32, torch.float64))
    impl = kernel_impl()
    trial.tried = f"row work {impl}, {rows} rows of {vocab} logits, {dtype}"
    generator = seeded(trial.rng)
    logits = torch.randn(rows, vocab, generator=generator, dtype=dtype) * 5
    ids = torch.randint(0, vocab, (rows,), generator=generator)

    def run(_place: int) -> dict[str, Tensor]:
        work = logits.clone()
        cap = reference.LogitTransform(softcap=30.0)
        if impl == "torch":
            logps, grads, _ = reference.row_logps(work, ids, cap, None, with_grads=True)
        else:
            logps, grads = native.row_logps(work, ids, cap, None, work), work
        assert grads is not None
        return {"logps": logps, "grads": grads}

    one, two = _twice(run)
    expect(equal_weights(one, two), "one thread and two differ")


def _same_training(trial: Trial) -> None:
    options: dict[str, Any] = {
        "max_steps": 3,
        "packing": trial.rng.random() < 0.7,
        "seed": trial.rng.randrange(1000),
    }
    name = trial.rng.choice(("llama", "qwen3", "gpt2"))
    trial.tried = f"training of {name}, {options}"

    def run(place: int) -> dict[str, Tensor]:
        trainer = tiny_trainer(
            trial.folder / str(place),
            model=tiny_model(name),
            pairs=random_pairs(12, trial.index),
            **options,
        )
        trainer.train()
        losses.append(logged_losses(trainer))
        return trained_weights(trainer)

    losses: list[list[float]] = []
    _twice(run)
    # Not the weights: AdamW's first steps are of the learning rate's size, whatever the gradient's.
    worst = max(abs(a - b) for a, b in zip(losses[0], losses[2], strict=True))
    expect(worst < 1e-3, f"losses with one thread and with two differ by {worst:.2g}")


CHECKS = [
    Check(24, "same seed, same bits, with one thread and with two", 10, same_bits, least=4),
]
