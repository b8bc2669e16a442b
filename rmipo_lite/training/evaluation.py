"""`PairEvaluation`: what an evaluation of pairs is, for a transformers Trainer.

The loss and the metrics are means over every pair, whatever the batches are, and no logits are
ever held. Mode and random state are left as they were.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, SequentialSampler
from transformers.trainer_utils import EvalLoopOutput

from rmipo_lite.checkpoints.random_state import kept_random_state
from rmipo_lite.checkpoints.trainer_mixin import TrainerBeside
from rmipo_lite.config import RMiPOConfig
from rmipo_lite.data.report import name_rows
from rmipo_lite.model.backbone import evaluating
from rmipo_lite.output.console import say
from rmipo_lite.output.uncertainty import PairedValues
from rmipo_lite.step import pair_values
from rmipo_lite.step.pair_values import PairValues
from rmipo_lite.tokens.pair import TokenizedPair
from rmipo_lite.training.interrupt import GracefulInterrupt
from rmipo_lite.watch.completions import (
    CLIPPED,
    MEAN_LENGTH,
    REPETITION,
    REPETITIVE,
    completion_numbers,
)
from rmipo_lite.watch.doctor import Doctor
from rmipo_lite.watch.progress import ProgressDisplay, phase

_OWN_CALLBACKS = (Doctor, GracefulInterrupt, ProgressDisplay)
# What transformers adds to every evaluation, and what stands there at times.
_ALSO_MEASURED = ("runtime", "samples_per_second", "steps_per_second", "rmipo/dropped_pairs")


class PairEvaluation(TrainerBeside):
    """Mixin for `transformers.Trainer`; put it before Trainer in the bases."""

    _can_answer = True

    held_out_values: PairedValues  # of every pair and answer, for how sure the numbers are

    def evaluate_before(self) -> dict[str, float]:
        """Evaluate ahead of a run: heard by the package's own callbacks alone.

        Others have heard of no run yet (transformers sends `on_train_begin` first), and would fail
        or write elsewhere than into the run's folder.
        """
        handler = self.callback_handler
        everybody = handler.callbacks
        handler.callbacks = [c for c in everybody if isinstance(c, _OWN_CALLBACKS)]
        try:
            return dict(self.evaluate())
        finally:
            handler.callbacks = everybody

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Means over all pairs of the dataset. Leaves mode and random state as they were."""
        parts: list[PairValues] = []
        rows: list[int] = []
        set_mode(self.optimizer, "eval")
        # A dataloader draws a seed for its workers, and dropout would go on from elsewhere.
        with kept_random_state():
            batches = list(dataloader)
        self.callback_handler.eval_dataloader = dataloader
        total = sum(len(inputs["pairs"]) for inputs in batches)
        going_on = phase(cast(Any, self), "evaluating", total, "pairs")
        with evaluating(self.model), going_on as advance:
            for inputs in batches:
                for pairs, values in self.pair_step.evaluate(inputs["pairs"]):
                    parts.append(values)
                    rows += [pair.row for pair in pairs]
                    advance(len(rows))
                self.control = self.callback_handler.on_prediction_step(
                    self.args, self.state, self.control
                )
                if self._may_stop_evaluating():
                    say(f"Evaluation stopped after {len(rows)} pairs: it has no numbers")
                    return _evaluated({}, metric_key_prefix, 0)
        if not parts:
            raise ValueError("eval_dataset: no pair to evaluate")
        numbers = self._eval_numbers(parts, rows, metric_key_prefix)
        pairs = [pair for inputs in batches for pair in inputs["pairs"]]
        numbers |= self._answers(pairs, metric_key_prefix)
        return _evaluated(numbers, metric_key_prefix, len(rows))

    def _answers(self, pairs: list[TokenizedPair], prefix: str) -> dict[str, float]:
        """Numbers of the model's own answers to the first prompts; a run never ends with them."""
        if not self._can_answer or not self.args.eval_completions:
            return {}
        try:
            with phase(cast(Any, self), "answering prompts", unit="tokens") as advance:
                columns = self.pair_step.by_first(
                    lambda: completion_numbers(
                        self.model, self._tokenizer, pairs, self.args.eval_completions,
                        self.args.seed, lambda done, most: advance(done, total=most),
                    )
                )  # fmt: skip
        except Exception as error:
            self._can_answer = False
            reason = (str(error).splitlines() or [""])[0][:200]
            say(f"Evaluations answer no prompts: {type(error).__name__}: {reason}")
            return {}
        count = max(map(len, columns.values()), default=0)
        self._note_errors(prefix, range(count), columns)
        return {name: statistics.mean(values) for name, values in columns.items()}

    def _note_errors(
        self, prefix: str, cases: Sequence[int], columns: dict[str, list[float]]
    ) -> None:
        named = {f"{prefix}_{name}": values for name, values in columns.items()}
        self.held_out_values.note(cases, named)

    def _may_stop_evaluating(self) -> bool:
        """Whether Ctrl-C asks for an end, and no choice of the best model hangs on the numbers."""
        asked = self.pair_step.group.any(
            any(
                isinstance(callback, GracefulInterrupt) and callback.requested
                for callback in self.callback_handler.callbacks
            )
        )
        return asked and self.args.metric_for_best_model is None

    def _eval_numbers(
        self, parts: list[PairValues], rows: list[int], prefix: str
    ) -> dict[str, float]:
        """Means over the pairs whose loss is a number; the others are named and counted."""
        values = pair_values.concat(parts)
        is_finite = pair_values.finite_pairs(values)
        values = pair_values.select(values, is_finite)
        numbers = {}
        if len(values.loss):
            numbers = {"loss": float(values.loss.mean()), **pair_values.reduce([values], self.args)}
            sound = [row for row, good in zip(rows, is_finite.tolist(), strict=True) if good]
            self._note_errors(prefix, sound, pair_values.cases(values, self.args))
        bad = [row for row, good in zip(rows, is_finite.tolist(), strict=True) if not good]
        if bad:
            say(f"Evaluation: {len(bad)} pair(s) left out, loss not finite (row {name_rows(bad)})")
            numbers["rmipo/dropped_pairs"] = float(len(bad))
        return numbers

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        return SequentialSampler(eval_dataset)

    def _get_dataloader(self, *args: Any, is_training: bool = False, **kwargs: Any) -> Any:
        """`dataloader_drop_last` is for training: an evaluation is of every pair."""
        drop_last = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = drop_last and is_training
        try:
            return super()._get_dataloader(  # type: ignore[misc]
                *args, is_training=is_training, **kwargs
            )
        finally:
            self.args.dataloader_drop_last = drop_last


def metric_names(args: RMiPOConfig, datasets: list[str]) -> list[str]:
    """What an evaluation gives; of several datasets, by name, each with its own."""
    both = PairValues(*[torch.tensor([0.0, 1.0])] * len(fields(PairValues)))  # labels, of rows
    names = ["loss", *pair_values.reduce([both], args), *_ALSO_MEASURED]
    if args.eval_completions:
        names += [MEAN_LENGTH, CLIPPED, REPETITION, REPETITIVE]
    return [f"eval_{part}{name}" for part in datasets or [""] for name in names]


def set_mode(optimizer: Any, mode: str) -> None:
    """Schedule-free optimizers hold other weights in training than in evaluations."""
    change = getattr(optimizer, mode, None)
    if callable(change):
        change()


def _evaluated(numbers: dict[str, float], prefix: str, num_samples: int) -> EvalLoopOutput:
    return EvalLoopOutput(
        predictions=np.empty(0),  # no logits are ever held
        label_ids=None,
        metrics={f"{prefix}_{name}": value for name, value in numbers.items()},
        num_samples=num_samples,
    )
