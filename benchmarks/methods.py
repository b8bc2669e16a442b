"""The methods side by side on the demo's task: two kinds of pairs, two learning rates, three seeds.

Every run trains the shipped model with LoRA on the same questions for the same steps and is scored
by the true reward on the same held-out prompts. The constant gamma is the mean that the RMiPO run
of the same pairs, rate and seed logged: what is left between the two is the pair's own margin.
What comes out is written down as it is; three seeds of one tiny task rank no method.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import multiprocessing
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.records import Record
from rmipo_lite import demo, run
from rmipo_lite.demo.scoring import sample_answers, score_answers
from rmipo_lite.demo.task import held_out_questions
from rmipo_lite.results.result import TrainResult
from rmipo_lite.system.processes import cores

STEPS = 90
LEARNING_RATES = (1e-3, 3e-3)
SEEDS = (0, 1, 2)
PAIRS = {"terse preferred": demo.load_rows, "wordy preferred": demo.length_biased_rows}
CONSTANT_GAMMA = "constant gamma"
METHODS = ("rmipo", CONSTANT_GAMMA, "simpo", "simper")
_UNITS = {
    "mean_reward": "reward",
    "mean_tokens": "tokens",
    "held-out accuracy": "share of pairs",
    "held-out margin": "nats per token",
    "chosen log-prob": "nats per token",
    "mean gamma": "reward units",
}
_OPTIONS: dict[str, Any] = {
    "save_strategy": "no",
    "logging_steps": 5,
    "per_device_train_batch_size": 32,
    "length_balance": "off",
    "end_anchor": 0.0,
    "sft_weight": 0.0,
}


class Case(NamedTuple):
    """What the methods are compared on: one row of the table for each method."""

    pairs: str
    learning_rate: float
    seed: int

    @property
    def shape(self) -> str:
        """As it stands in the rows."""
        return f"{self.pairs}, learning rate {self.learning_rate:g}, seed {self.seed}"


def bench(
    steps: int = STEPS, rates: tuple[float, ...] = LEARNING_RATES, seeds: tuple[int, ...] = SEEDS
) -> Iterator[Record]:
    """Every case in a process of its own with one thread, as many at once as there are cores."""
    cases = [Case(*case) for case in itertools.product(PAIRS, rates, seeds)]
    with ProcessPoolExecutor(
        max_workers=min(len(cases), cores()),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(1,),
    ) as pool:
        waiting = [pool.submit(run_case, case, steps) for case in cases]
        for done in as_completed(waiting):
            yield from done.result()


def run_case(case: Case, steps: int) -> list[Record]:
    """Train with every method; rows of what each came to, and of the start."""
    records: list[Record] = []
    gamma: float | None = None
    for method in METHODS:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            result = _train(case, method, gamma, steps, Path(folder) / "run")
            before, after = _numbers(result, case.seed)
        if method == "rmipo":
            gamma = after["mean gamma"]
            records += _rows(case, "before training", before)
        records += _rows(case, method, after)
    return records


def _train(case: Case, method: str, gamma: float | None, steps: int, folder: Path) -> TrainResult:
    options = dict(_OPTIONS, loss_type="rmipo" if method == CONSTANT_GAMMA else method)
    if method == CONSTANT_GAMMA:
        options |= {"gamma_min": gamma, "gamma_max": gamma}
    return run.train(
        demo.MODEL,
        PAIRS[case.pairs](),
        output_dir=folder,
        learning_rate=case.learning_rate,
        seed=case.seed,
        max_steps=steps,
        sample_prompts=0,
        **options,
    )


def _numbers(result: TrainResult, seed: int) -> tuple[dict[str, float], dict[str, float]]:
    """Numbers of the start and of the end, the true reward's and the held-out pairs'."""
    questions = held_out_questions()
    model, tokenizer = result.model, result.tokenizer
    with result.adapter_off():
        opponents = sample_answers(model, tokenizer, questions, seed=10_000 + seed)
        first = sample_answers(model, tokenizer, questions, seed=seed)
    last = sample_answers(model, tokenizer, questions, seed=seed)
    both = []
    for answers, held_out in ((first, result.metrics_before), (last, result.metrics)):
        numbers = asdict(score_answers(questions, answers, opponents))
        chosen, rejected = (held_out[f"eval_logps/{side}"] for side in ("chosen", "rejected"))
        numbers["held-out accuracy"] = held_out["eval_rewards/accuracies"]
        numbers["held-out margin"] = chosen - rejected
        numbers["chosen log-prob"] = chosen
        both.append(numbers)
    gammas = [entry["rmipo/gamma"] for entry in result.history if "rmipo/gamma" in entry]
    if gammas:
        both[1]["mean gamma"] = sum(gammas) / len(gammas)
    return both[0], both[1]


def _rows(case: Case, method: str, numbers: dict[str, float]) -> list[Record]:
    return [
        Record(
            "methods", method, case.shape, "fp32", name.replace("_", " "),
            _UNITS.get(name, "share of prompts"), value, value, value,
        )
        for name, value in numbers.items()
    ]  # fmt: skip
