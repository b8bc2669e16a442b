"""`learning_rate="auto"`: the range test of `range_test.py` before a transformers Trainer's run.

It takes steps with the run's own optimizer, loss and pairs, and puts everything back: weights,
random state, the gradient scaler. The run that follows is bit for bit the one with the number that
was found passed by hand, whatever its schedule, warm-up and batch.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from torch.optim import SGD, Optimizer
from transformers import Trainer, get_scheduler

from rmipo_lite.checkpoints.random_state import kept_random_state
from rmipo_lite.checkpoints.trainer_mixin import TrainerBeside
from rmipo_lite.config import RMiPOConfig
from rmipo_lite.data.report import name_rows
from rmipo_lite.output.console import say
from rmipo_lite.planning.range_test import FIRST_RATE, RangeTest
from rmipo_lite.step.gradients import clip
from rmipo_lite.step.likely_words import LikelyWords
from rmipo_lite.step.pair_step import PairStep
from rmipo_lite.tokens.pair import TokenizedPair
from rmipo_lite.training.evaluation import set_mode
from rmipo_lite.training.interrupt import GracefulInterrupt
from rmipo_lite.watch.progress import phase

SEARCH_STEPS = 25  # that a search takes on real models, more or less; most in 16 bits
PAIRS_OF_A_STEP = 16  # at most: the size of an Adam step doesn't hang on the batch
_MEASURED_PAIRS = 16  # after every step, forward alone


def pairs_of_a_search(pairs_per_step: int) -> float:
    """What a search takes, in trained pairs: its steps' own, and a third for one that is scored."""
    return SEARCH_STEPS * (min(pairs_per_step, PAIRS_OF_A_STEP) + _MEASURED_PAIRS / 3)


class FindsLearningRate(TrainerBeside):
    """Mixin for `transformers.Trainer`; put it before Trainer in the bases.

    Attributes:
        found_rate: what the search came to; None where there was none, or not yet.
        range_test: the search itself, as far as it has come; None where there was none.
    """

    found_rate: float | None = None
    range_test: RangeTest | None = None

    @property
    def learning_rate(self) -> float | None:
        """The run's peak rate; None while it isn't found."""
        given = self.args.learning_rate
        return self.found_rate if given == "auto" else float(given)

    def get_optimizer_cls_and_kwargs(self, args: Any, model: Any = None) -> tuple[Any, Any]:
        """transformers', which wants a number for the rate."""
        if args.learning_rate == "auto":
            args = copy.copy(args)
            args.learning_rate = self.found_rate or FIRST_RATE
        return Trainer.get_optimizer_cls_and_kwargs(args, model)

    def find_learning_rate(self) -> None:
        """Search where the options ask for it and nothing is found yet.

        Raises:
            ValueError: no rate that was tried changes the model.
            KeyboardInterrupt: Ctrl-C; the weights are as they were.
        """
        if self.args.learning_rate == "auto":
            with_own_rate(self.args, self.optimizer)  # one that was set since has its own
        if self.args.learning_rate != "auto":
            return
        if self.found_rate is not None:  # a resumed run's, also where it has other steps now
            say(f"Learning rate {self.found_rate:.2g}, as found when the run began")
            return
        pairs = cast(list[TokenizedPair], self.train_dataset)
        draw = random.Random(self.args.seed)
        measured = _measured(self.pair_step, draw.sample(pairs, min(len(pairs), _MEASURED_PAIRS)))
        self.range_test = test = RangeTest()
        looking = phase(cast(Any, self), test.words)
        tries = self.pair_step.put_back()
        with kept_random_state(), tries, self._put_back() as optimizer, looking as advance:
            while not test.is_over:
                size = min(len(pairs), self.args.pairs_per_step, PAIRS_OF_A_STEP)
                self._step_at(test.rate, optimizer, draw.sample(pairs, size))
                test.stepped(*measured.shares())
                advance(test.taken, test.words)
                self._hear()
        is_held = self.args.sft_weight > 0
        self.found_rate = rate = test.learning_rate(self._schedule_factors(), is_held=is_held)
        how = "" if is_held else " (half of it, since without sft_weight nothing holds the wording)"
        if not test.is_broken:
            how += " (nothing breaks this model: are its weights random?)"
        say(f"Learning rate {rate:.2g}, found in {test.taken} steps, now taken back{how}")

    def run_steps(self) -> int:
        """Optimizer steps of a whole run."""
        pairs = cast(list[TokenizedPair], self.train_dataset)
        return int(self.args.steps_of_a_run(len(pairs)))

    def _schedule_factors(self) -> float:
        """The factors that the schedule multiplies the rate by, summed over the run's steps."""
        steps = self.run_steps()
        optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        schedule = get_scheduler(
            self.args.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=self.args.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=self.args.lr_scheduler_kwargs,
        )
        if not hasattr(schedule, "lr_lambdas"):  # one that follows a metric begins as a constant
            return float(steps)
        factors = 0.0
        for _ in range(steps):
            factors += optimizer.param_groups[0]["lr"]
            optimizer.step()
            schedule.step()
        return factors

    def _step_at(self, rate: float, optimizer: Any, pairs: list[TokenizedPair]) -> None:
        for group in optimizer.param_groups:
            group["lr"] = rate * group["rate_share"]
        self.model.train()
        self.pair_step.train(pairs, self.accelerator.backward)
        scaler = self._scaler
        if scaler is not None:
            scaler.unscale_(optimizer)
        if self.args.max_grad_norm:
            clip(self.model, self.args.max_grad_norm)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        self.model.zero_grad(set_to_none=True)

    @property
    def _scaler(self) -> Any:
        """Of float16 gradients, else None."""
        return getattr(self.accelerator, "scaler", None)

    @contextmanager
    def _put_back(self) -> Iterator[Any]:
        """An optimizer as the run will have one; afterwards every trained weight as it was."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        was = [p.detach().to("cpu", copy=True) for p in trained]
        scaler = self._scaler
        scale = None if scaler is None else scaler.state_dict()
        mode = self.model.training
        try:
            optimizer = cast(Any, self).create_optimizer()
            set_mode(optimizer, "train")
            for group in optimizer.param_groups:  # LoRA+ gives some a multiple
                group["rate_share"] = group["lr"] / FIRST_RATE
            yield optimizer
        finally:
            self.optimizer = None
            if scaler is not None:
                scaler.load_state_dict(scale)
            for parameter, weight in zip(trained, was, strict=True):
                parameter.data.copy_(weight)
                parameter.grad = None
            cast(nn.Module, self.model).train(mode)

    def _hear(self) -> None:
        """Ctrl-C."""
        for callback in self.callback_handler.callbacks:
            asked = isinstance(callback, GracefulInterrupt) and callback.requested
            if self.pair_step.group.any(asked):
                raise KeyboardInterrupt


def with_own_rate(args: RMiPOConfig, optimizer: Optimizer | None) -> RMiPOConfig:
    """The same options (`args` is a copy already); of an optimizer that is given, its own rate."""
    if optimizer is not None:
        first = optimizer.param_groups[0]
        args.learning_rate = float(first.get("initial_lr", first["lr"]))  # a warm-up begins at 0
    return args


def _measured(step: PairStep, pairs: list[TokenizedPair]) -> LikelyWords:
    """What the model says at their responses; pairs where that isn't numbers are named."""
    words = LikelyWords(step, pairs)
    bad = name_rows(words.bad_rows)
    if not words.pairs:
        raise ValueError(
            "learning_rate='auto': of no pair that was measured are the probabilities numbers "
            f"(rows {bad}); pass a number, or find out why"
        )
    if bad:
        say(f"Left out of the search, probabilities that are no numbers: row {bad}")
    return words
