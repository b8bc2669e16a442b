"""Faults on purpose: numbers that aren't finite, writes that fail."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor

from rmipo_lite.model.backbone import scored_hidden
from rmipo_lite.step import pair_step as step_module
from rmipo_lite.tokens.pair import TokenizedPair
from rmipo_lite.training.trainer import RMiPOTrainer

Place = Literal["loss", "logits", "gradient"]
PLACES: tuple[Place, ...] = ("loss", "logits", "gradient")


class Poison:
    """Makes numbers of chosen pairs NaN or inf, in a given optimizer step.

    Args:
        trainer: whose steps are poisoned, inside the `with` block.
        place: the pair's loss, the hidden rows its logits come from, or their gradient.
        value: NaN or an infinity.
        step: the optimizer step, from 1; None for all.
        choose: rows of a micro-step -> the rows to poison.
        once: whether it is over after the first time, as a fault of the hardware would be.

    Attributes:
        rows: the rows that were poisoned.
    """

    def __init__(
        self,
        trainer: RMiPOTrainer,
        place: Place,
        value: float,
        step: int | None,
        choose: Callable[[Sequence[int]], set[int]],
        once: bool = False,
    ) -> None:
        self.rows: set[int] = set()
        self._trainer, self._place, self._value = trainer, place, value
        self._step, self._choose, self._once = step, choose, once
        self._pairs: Sequence[TokenizedPair] = ()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Poison:
        pair_step = self._trainer.pair_step
        self._forward = pair_step._forward
        self._hidden = scored_hidden
        self._stack.enter_context(mock.patch.object(pair_step, "_forward", self._in_forward))
        self._stack.enter_context(mock.patch.object(step_module, "scored_hidden", self._in_hidden))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _hits(self) -> list[int]:
        """Places of the poisoned pairs among those of the micro-step."""
        due = self._step is None or self._trainer.state.global_step + 1 == self._step
        if not due or not torch.is_grad_enabled() or (self._once and self.rows):
            return []
        chosen = self._choose([pair.row for pair in self._pairs])
        self.rows |= chosen
        return [place for place, pair in enumerate(self._pairs) if pair.row in chosen]

    def _in_forward(self, pairs: Sequence[TokenizedPair], prior_of: Any) -> Any:
        self._pairs = pairs
        values, losses, *rest = self._forward(pairs, prior_of)
        if self._place == "loss":
            hit = torch.zeros_like(losses, dtype=torch.bool)
            hit[self._hits()] = True
            losses = losses.masked_fill(hit, self._value)
        return values, losses, *rest

    def _in_hidden(self, model: Any, inputs: Any) -> Tensor:
        hidden = self._hidden(model, inputs)
        if self._place == "loss" or not torch.is_grad_enabled():
            return hidden
        borders = inputs.cu_seqlens.tolist()
        hit = torch.zeros(len(hidden), 1, dtype=torch.bool)
        for place in self._hits():
            hit[borders[2 * place] : borders[2 * place + 1]] = True
        if not hit.any():
            return hidden
        if self._place == "logits":
            return hidden.masked_fill(hit, self._value)
        hidden.register_hook(lambda grad: grad.masked_fill(hit, self._value))
        return hidden


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """No file can grow beyond `size` bytes: every writer, also those in Rust, fails for real."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
