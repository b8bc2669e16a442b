"""The reference model of DPO and its kind: the model as it came to the run.

It doesn't change, so what it says of a pair is computed once and kept: no second model is loaded,
and no pass of it is in the training steps. `reference="live"` computes it every time, from a copy
of the trained weights as they were.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from rmipo_lite.adapters.start import moved_towards, swapped
from rmipo_lite.model.batch import ModelInput
from rmipo_lite.model.head import ModelHead
from rmipo_lite.tokens.pair import TokenizedPair

Sums = dict[str, tuple[float, float]]  # key of a pair -> sums of chosen and rejected, nats


class Scores(Protocol):
    """What is wanted of the step that passes pairs through the reference's model."""

    model: nn.Module

    def response_sums(
        self, pairs: Sequence[TokenizedPair]
    ) -> Iterable[tuple[TokenizedPair, tuple[float, float]]]:
        """Pairs, in any order, with their sums under the weights that are in force."""

    def states(self, pairs: Sequence[TokenizedPair]) -> tuple[Tensor, ModelHead, ModelInput]:
        """Hidden rows (N, H) of the scored tokens, the head, and what was passed, likewise."""


def key_of(pair: TokenizedPair) -> str:
    """What a pair's log-probs hang on: its tokens."""
    found = hashlib.blake2b(digest_size=16)
    sides = (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids, pair.rejected_prompt_ids or [])
    for ids in sides:
        found.update(array("q", [len(ids), *ids]).tobytes())
    return found.hexdigest()


class Reference:
    """The reference's sums of log-probs, by pair.

    Args:
        step: the policy's own, or another model's.
        start: weights in which the reference differs from the step's model, by name: the policy's
            trained ones as they came to the run; None: none were kept, and the reference is the
            model itself until `close`.
        is_live: whether nothing is kept.

    Attributes:
        known: what was computed, as a checkpoint keeps it.
        start: as given, or where `move` brought it.
    """

    def __init__(
        self,
        step: Scores,
        start: Mapping[str, Tensor] | None,
        *,
        is_live: bool = False,
    ) -> None:
        self.step, self.start, self._is_live = step, start, is_live
        self._is_open = True
        self.known: Sums = {}

    def close(self) -> None:
        """Training begins: from here on the model is no longer its own reference."""
        self._is_open = self.start is not None

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Inside the block the step's model is the reference."""
        with swapped(self.step.model, self.start or {}):
            yield

    def move(self, share: float) -> None:
        """TR-DPO's update (Gorbatovski et al. 2024, arXiv 2404.09656), towards the model as it is.

        What is known of pairs is of the reference that was.
        """
        assert self.start is not None
        self.start = moved_towards(self.step.model, self.start, share)
        self.known = {}

    def missing(self, pairs: Sequence[TokenizedPair]) -> list[TokenizedPair]:
        """The pairs that nothing is known of, each once."""
        found = {key: pair for pair in pairs if (key := key_of(pair)) not in self.known}
        return list(found.values())

    def know(self, pairs: Sequence[TokenizedPair]) -> None:
        """Compute what isn't known of the pairs; all of it where the reference is live.

        Raises:
            ValueError: the model was trained in full, and its start is gone.
        """
        if self._is_live:
            self.known = {}
        missing = self.missing(pairs)
        if not missing:
            return
        if not self._is_open:
            raise ValueError(
                f"reference: {len(missing)} of these pairs were not there when the run began, and "
                "the model has changed since; pass them as eval_dataset, or reference='live', "
                "which keeps a copy of the weights"
            )
        with self.in_force():
            found = self.step.response_sums(missing)
            self.known |= {key_of(pair): sums for pair, sums in found}

    def sums(self, pairs: Sequence[TokenizedPair]) -> Tensor:
        """(2P,) float64, chosen and rejected in turn, of pairs that are known."""
        return torch.tensor([s for p in pairs for s in self.known[key_of(p)]], dtype=torch.float64)
