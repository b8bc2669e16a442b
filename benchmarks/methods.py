"""Methods beside trl's own trainers: the same model, pairs and order, the losses step by step.

The demo's model is trained in full, in float32, so that neither side draws a random number.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.peers import module
from benchmarks.records import Record
from rmipo_lite import RMiPOConfig, RMiPOTrainer
from rmipo_lite.demo import MODEL, load_rows
from rmipo_lite.ops.reference import IGNORED
from rmipo_lite.output.console import say
from rmipo_lite.tokens.pair import TokenizedPair
from rmipo_lite.tokens.prepare import prepare

STEPS, PAIRS_OF_A_STEP = 20, 4
_SHARED: dict[str, Any] = {
    "per_device_train_batch_size": PAIRS_OF_A_STEP, "max_steps": STEPS, "learning_rate": 1e-4,
    "lr_scheduler_type": "constant", "warmup_steps": 0, "logging_steps": 1, "report_to": "none",
    "save_strategy": "no", "use_cpu": True, "bf16": False, "disable_tqdm": True,
    "train_sampling_strategy": "sequential", "gradient_checkpointing": False, "max_length": 256,
}  # fmt: skip


@dataclass(frozen=True)
class Method:
    """A method of ours and what trl calls it."""

    ours: dict[str, Any]
    trainer: str  # of trl: dpo, cpo, orpo or kto
    theirs: dict[str, Any] = field(default_factory=dict)


METHODS = {
    "dpo": Method({}, "dpo", {"loss_type": "sigmoid"}),
    "robust": Method({}, "dpo", {"loss_type": "robust", "label_smoothing": 0.1}),
    "dpo_norm": Method({"beta": 2.0}, "dpo", {"loss_type": "sigmoid_norm", "beta": 2.0}),
    "ipo": Method({}, "dpo", {"loss_type": "ipo"}),
    "apo_zero": Method({}, "dpo", {"loss_type": "apo_zero"}),
    "apo_down": Method({}, "dpo", {"loss_type": "apo_down"}),
    "dpo_hinge": Method({}, "dpo", {"loss_type": "hinge"}),
    "cpo": Method({}, "cpo", {"loss_type": "sigmoid", "cpo_alpha": 1.0}),
    "alphapo": Method(
        {}, "cpo",
        {"loss_type": "simpo", "alpha": 0.25, "beta": 2.5, "simpo_gamma": 0.1, "cpo_alpha": 0.0},
    ),
    "orpo": Method({}, "orpo"),
    "kto": Method({"undesirable_weight": 1.5}, "kto", {"undesirable_weight": 1.5}),
}  # fmt: skip


def bench(names: Sequence[str] = tuple(METHODS)) -> Iterator[Record]:
    """The largest difference of a step's loss, method by method."""
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            ours = _ours(name, METHODS[name], folder)
            theirs = _theirs(METHODS[name], folder)
        worst = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        say(f"{name:10} {len(ours)} steps, {ours[0]:.3f} to {ours[-1]:.3f}, off by {worst:.1e}")
        shape = f"demo's model, {STEPS} steps of {PAIRS_OF_A_STEP} pairs"
        yield Record(
            "methods", name, shape, "float32", "loss, largest difference to trl", "", worst
        )


def _rows(method: Method) -> list[dict[str, Any]]:
    """As many of the demo's pairs as a run takes, or one side of each, every third the worse."""
    pairs = load_rows()[: STEPS * PAIRS_OF_A_STEP]
    if method.trainer != "kto":
        return pairs
    sides = ["rejected" if number % 3 == 0 else "chosen" for number in range(len(pairs))]
    return [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair, side in zip(pairs, sides, strict=True)
    ]


def _mismatched_in_a_step(pairs: list[TokenizedPair]) -> list[TokenizedPair]:
    """The completion before it in the step stands on a row's other side, as trl has it."""
    found = []
    for number, pair in enumerate(pairs):
        before = number - 1 if number % PAIRS_OF_A_STEP else number + PAIRS_OF_A_STEP - 1
        sides = (pairs[before].rejected_ids, pairs[before].chosen_ids)
        other = sides[bool(pairs[before].label)]
        found.append(
            replace(pair, rejected_ids=other) if pair.label else replace(pair, chosen_ids=other)
        )
    return found


def _model() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)


def _ours(name: str, method: Method, folder: str) -> list[float]:
    args = RMiPOConfig(
        f"{folder}/ours", loss_type=name, eval_completions=0, **_SHARED, **method.ours
    )
    model, tokenizer = _model(), AutoTokenizer.from_pretrained(MODEL)
    rows: Any = _rows(method)
    if method.trainer == "kto":
        rows = _mismatched_in_a_step(prepare(rows, tokenizer, args, model.config).pairs)
    trainer = RMiPOTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    return _logged(trainer)


def _theirs(method: Method, folder: str) -> list[float]:
    datasets = module("datasets")
    kind, is_main = method.trainer.upper(), method.trainer in ("dpo", "kto")
    trl = module("trl" if is_main else f"trl.experimental.{method.trainer}")
    options = {**_SHARED, "remove_unused_columns": False, **method.theirs}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        args = getattr(trl, f"{kind}Config")(f"{folder}/trl", **options)
        trainer_of = getattr(trl, f"{kind}Trainer")
        trainer = (_with_response_alone(trainer_of) if kind == "ORPO" else trainer_of)(
            model=str(MODEL) if is_main else _model(), args=args,
            train_dataset=datasets.Dataset.from_list(_rows(method)),
            processing_class=AutoTokenizer.from_pretrained(MODEL),
        )  # fmt: skip
        trainer.train()
    return _logged(trainer)


def _with_response_alone(trainer_of: Any) -> Any:
    """trl's ORPOTrainer with the likelihood of the response; its own is of the prompt too."""

    class ResponseAlone(trainer_of):
        def concatenated_forward(self, model: Any, batch: Any) -> Any:
            found = list(super().concatenated_forward(model, batch))
            logits, labels = found[2], batch["chosen_labels"][:, 1:]  # logits end one earlier
            short = logits.shape[1] - labels.shape[1]
            labels = torch.nn.functional.pad(labels, (0, short), value=IGNORED)
            found[4] = torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), labels, ignore_index=IGNORED
            )
            return tuple(found)

    return ResponseAlone


def _logged(trainer: Any) -> list[float]:
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]
