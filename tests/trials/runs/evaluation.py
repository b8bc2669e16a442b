"""Checks 29, 30: evaluation measures what training does and changes nothing; the log adds up."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from rmipo_lite.training.run_log import PAIR_VALUES_FILE
from tests.kit import (
    equal_weights,
    logged_losses,
    random_pairs,
    tiny_model,
    tiny_trainer,
    trained_weights,
)
from tests.trials.scorecard import Check, Trial, Trials, expect

_LOSSES = ("rmipo", "simpo", "hinge", "simper")
_EXACT = 1e-6


def _some_options(trial: Trial) -> dict[str, Any]:
    """Options that a run may have; every loss by turns."""
    loss_type = _LOSSES[trial.index % len(_LOSSES)]
    options: dict[str, Any] = {
        "loss_type": loss_type,
        "packing": trial.rng.random() < 0.7,
        "max_tokens_per_microstep": trial.rng.choice(("auto", 1, 50)),
        "per_device_train_batch_size": trial.rng.choice((2, 4)),
        "gradient_accumulation_steps": trial.rng.choice((1, 2)),
    }
    if loss_type == "rmipo":
        options["gamma_scaled_by_beta"] = trial.rng.random() < 0.5
        options["label_smoothing"] = trial.rng.choice((0.0, 0.1))
    return options


# ---- 29: evaluation -------------------------------------------------------------------------


def evaluation(trials: Trials) -> None:
    """Evaluated on the training pairs: the first logged loss; and the run is the same run."""
    for trial in trials:
        with trial:
            options = _some_options(trial) | {"disable_dropout": False}
            trial.tried = str(options)
            _first_loss(trial, options)
            _same_run(trial, options)


def _first_loss(trial: Trial, options: dict[str, Any]) -> None:
    whole = {**options, "per_device_train_batch_size": 7, "gradient_accumulation_steps": 1}
    trainer = tiny_trainer(trial.folder / "first", count=7, max_steps=1, **whole)
    trainer.model.train()
    evaluated = trainer.evaluate(trainer.train_dataset)
    expect(trainer.model.training, "evaluation left the model in another mode")
    again = trainer.evaluate(trainer.train_dataset)
    names = [name for name in evaluated if "rewards" in name or "loss" in name]
    expect(all(evaluated[name] == again[name] for name in names), "twice evaluated, two results")
    trainer.train()
    logged = trainer.state.log_history[-2]
    for name in ("loss", "rewards/margins", "rewards/accuracies"):
        error = abs(evaluated[f"eval_{name}"] - logged[name])
        expect(error < _EXACT, f"{name}: evaluated {evaluated[f'eval_{name}']}, {logged[name]}")


def _same_run(trial: Trial, options: dict[str, Any]) -> None:
    def run(folder: Path, **more: Any) -> Any:
        model = tiny_model(attention_dropout=0.1)  # so that random numbers matter
        trainer = tiny_trainer(
            folder, model=model, eval_pairs=random_pairs(5, seed=trial.index), **options, **more
        )
        trainer.train()
        return trained_weights(trainer), logged_losses(trainer)

    weights, losses = run(trial.folder / "without")
    with_eval = run(trial.folder / "with", eval_strategy="steps", eval_steps=1)
    expect(equal_weights(weights, with_eval[0]), "evaluation changed the weights of the run")
    expect(losses == with_eval[1], "evaluation changed the logged losses")


# ---- 30: metrics ----------------------------------------------------------------------------


def metrics_offline(trials: Trials) -> None:
    """Every logged number recomputed from the file of pair values, with accumulation."""
    for trial in trials:
        with trial:
            options = _some_options(trial)
            count, every = trial.rng.choice((7, 8, 11)), trial.rng.choice((1, 2, 3))
            trial.tried = f"{options}, {count} pairs, a log line in {every} steps"
            trainer = tiny_trainer(
                trial.folder,
                pairs=random_pairs(count, seed=trial.index),
                max_steps=6,
                logging_steps=every,
                save_pair_values=True,
                **options,
            )
            output = trainer.train()
            lines = (trial.folder / PAIR_VALUES_FILE).read_text().splitlines()
            pairs = [json.loads(line) for line in lines]
            logs = [entry for entry in trainer.state.log_history if "loss" in entry]
            last = 0
            for entry in logs:
                window = [pair for pair in pairs if last < pair["step"] <= entry["step"]]
                last = entry["step"]
                _compare(entry, window, trainer.args)
            expect(last == 6, f"the last log line is of step {last}")
            mean = _mean([pair["loss"] for pair in pairs])
            expect(abs(output.training_loss - mean) < _EXACT, f"train_loss {output.training_loss}")


def _compare(entry: dict[str, float], pairs: list[dict[str, Any]], args: Any) -> None:
    scale = args.beta if args.loss_type in ("rmipo", "simpo") else 1.0
    margins = [pair["chosen_logps"] - pair["rejected_logps"] for pair in pairs]
    wanted = {
        "loss": _mean([pair["loss"] for pair in pairs]),
        "rewards/chosen": scale * _mean([pair["chosen_logps"] for pair in pairs]),
        "rewards/rejected": scale * _mean([pair["rejected_logps"] for pair in pairs]),
        "rewards/margins": scale * _mean(margins),
        "rewards/accuracies": _mean([float(margin > 0) for margin in margins]),
        "lengths/chosen": _mean([pair["chosen_length"] for pair in pairs]),
    }
    if args.loss_type == "rmipo":
        defined = [pair["chosen_pmi"] for pair in pairs if pair["chosen_pmi"] is not None]
        gaps = [pair["pmi_gap"] for pair in pairs]
        spread = math.sqrt(_mean([(gap - _mean(gaps)) ** 2 for gap in gaps]))
        unknown = [pair["chosen_pmi"] is None or pair["rejected_pmi"] is None for pair in pairs]
        wanted |= {
            "rmipo/gamma": _mean([pair["gamma"] for pair in pairs]),
            "rmipo/pmi_gap": _mean(gaps),
            "rmipo/pmi_gap_std": spread,
            "rmipo/pmi_chosen": _mean(defined) if defined else 0.0,
            "rmipo/pmi_undefined": _mean([float(value) for value in unknown]),
        }
    for name, value in wanted.items():
        limit = _EXACT * max(1.0, abs(value))  # float32 numbers: relative above 1
        expect(abs(entry[name] - value) <= limit, f"{name}: logged {entry[name]}, is {value}")
    expect(0 <= entry["rewards/accuracies"] <= 1, "an accuracy outside [0, 1]")
    expect(all(math.isfinite(value) for value in entry.values()), "a number isn't finite")


def _mean(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).mean())


CHECKS = [
    Check(29, "evaluation = first training loss, and changes nothing", 10, evaluation),
    Check(30, "metrics recomputed from per-pair values", 20, metrics_offline),
]
