"""The reference model of DPO and its kind: the model as it came to the run.

It doesn't change, so what it says of a pair is computed once and kept: no second model is loaded,
and no pass of it is in the training steps. `reference="live"` computes it every time, from a copy
of the trained weights as they were.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from rmipo_lite.adapters.start import swapped
from rmipo_lite.tokens.pair import TokenizedPair

Sums = dict[str, tuple[float, float]]  # key of a pair -> sums of chosen and rejected, nats
Score = Callable[[Sequence[TokenizedPair]], Iterable[tuple[TokenizedPair, tuple[float, float]]]]


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
        model: the policy.
        start: its trained weights as they came to the run, by name; None: none were kept, and the
            reference is the model itself until `close`.
        score: pairs, in any order, with their sums under the model that is in force.
        is_live: whether nothing is kept.

    Attributes:
        known: what was computed, as a checkpoint keeps it.
    """

    def __init__(
        self,
        model: nn.Module,
        start: Mapping[str, Tensor] | None,
        score: Score,
        *,
        is_live: bool = False,
    ) -> None:
        self._model, self._start, self._score, self._is_live = model, start, score, is_live
        self._is_open = True
        self.known: Sums = {}

    def close(self) -> None:
        """Training begins: from here on the model is no longer its own reference."""
        self._is_open = self._start is not None

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
        with swapped(self._model, self._start or {}):
            self.known |= {key_of(pair): sums for pair, sums in self._score(missing)}

    def sums(self, pairs: Sequence[TokenizedPair]) -> Tensor:
        """(2P,) float64, chosen and rejected in turn, of pairs that are known."""
        return torch.tensor([s for p in pairs for s in self.known[key_of(p)]], dtype=torch.float64)
