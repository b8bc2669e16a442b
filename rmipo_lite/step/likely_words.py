"""How far a model has gone from its start: probability on words that it never would have said.

What breaks a text is not that answers become less likely, which a preference loss does to rejected
ones by right, but where their probability goes: to words that the model as it was gave no chance at
that place. So at every token of some responses the likely words of the start are kept, those with a
probability of at least 1 in 1000, the one that stands there, and the end of an answer, which a base
model has yet to learn; and afterwards

    moved    = 1/2 sum over words |p - p_start|, all unlikely words taken as one
    strayed  = max(0, sum over the unlikely words of p - p_start)

are means over the responses' tokens, each a share of the probability, 0 to 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rmipo_lite.model import batch
from rmipo_lite.model.batch import ModelInput
from rmipo_lite.model.head import ModelHead
from rmipo_lite.step.pair_step import PairStep
from rmipo_lite.tokens.pair import TokenizedPair

LEAST = 1e-3  # probability of a likely word
_LOGITS = 2**24  # held at a time


class _Likely(NamedTuple):
    """Of a block of N tokens."""

    tokens: Tensor  # (K,) int64, which of the N
    ids: Tensor  # (K,) int64, the likely words there
    probs: Tensor  # (K,) theirs at the start
    unlikely: Tensor  # (N,) that of all other words together


class LikelyWords:
    """The likely words of a step's model as it is now, at the tokens of some pairs' responses.

    Attributes:
        pairs: those that are measured.
        bad_rows: rows of the others: no token is scored, or its probabilities aren't numbers.
    """

    def __init__(self, step: PairStep, pairs: Sequence[TokenizedPair]) -> None:
        """One pass of the model, forward alone."""
        self._step = step
        self._likely: dict[int, list[_Likely]] = {}  # by row, of this process's pairs
        is_finite = step.of_responses(pairs, self._keep)
        self._all = pairs  # passed every time, so that processes share them out alike
        self.pairs = [pair for pair in pairs if is_finite[pair.row]]
        self.bad_rows = [pair.row for pair in pairs if not is_finite[pair.row]]

    def shares(self) -> tuple[float, float]:
        """(moved, strayed) of the model as it is now; a pass forward."""
        sums = self._step.of_responses(self._all, self._compare)
        good = [sums[pair.row] for pair in self.pairs]
        moved, strayed, tokens = map(sum, zip(*good, strict=True))
        return moved / tokens, strayed / tokens

    def _keep(
        self, pairs: Sequence[TokenizedPair], hidden: Tensor, head: ModelHead, given: ModelInput
    ) -> dict[int, bool]:
        found: dict[int, list[_Likely]] = {pair.row: [] for pair in pairs}
        for row, probs, targets in _probs(pairs, hidden, head, given):
            is_likely = (probs >= LEAST).scatter_(-1, targets[:, None], True)
            if self._step.end_id is not None:
                is_likely[:, self._step.end_id] = True
            tokens, ids = is_likely.nonzero(as_tuple=True)
            unlikely = probs.masked_fill(is_likely, 0).sum(-1)
            found[row].append(_Likely(tokens, ids, probs[tokens, ids], unlikely))
        self._likely |= found
        sums = {row: [block.unlikely for block in blocks] for row, blocks in found.items()}
        return {row: _are_numbers(torch.cat(unlikely)) for row, unlikely in sums.items()}

    def _compare(
        self, pairs: Sequence[TokenizedPair], hidden: Tensor, head: ModelHead, given: ModelInput
    ) -> dict[int, tuple[float, float, int]]:
        kept = {pair.row: iter(self._likely.get(pair.row, ())) for pair in pairs}
        sums = {pair.row: (0.0, 0.0, 0) for pair in pairs}
        for row, probs, _ in _probs(pairs, hidden, head, given):
            start = next(kept[row], None)
            if start is None:  # another process's pair, passed to keep a sharded model in step
                continue
            now = probs[start.tokens, start.ids]
            likely = torch.zeros_like(start.unlikely).index_add_(0, start.tokens, now)
            won = (1 - likely) - start.unlikely
            moved = float((now - start.probs).abs().sum() + won.abs().sum()) / 2
            before = sums[row]
            strayed = float(won.clamp(min=0).sum())
            sums[row] = before[0] + moved, before[1] + strayed, before[2] + len(probs)
        return sums


def _are_numbers(values: Tensor) -> bool:
    return len(values) > 0 and bool(values.isfinite().all())


def _probs(
    pairs: Sequence[TokenizedPair], hidden: Tensor, head: ModelHead, given: ModelInput
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(row, probabilities (N, V), the words that stand there (N,)) of every pair's own tokens."""
    size = max(1, _LOGITS // len(head.weight))
    first = 0
    for pair in pairs:
        for length, is_own in zip(batch.scored_lengths(pair), pair.own_sides, strict=True):
            if is_own:
                states = hidden[first : first + length].split(size)
                targets = given.target_ids[first : first + length].split(size)
                for some, there in zip(states, targets, strict=True):
                    yield pair.row, head.logits(some).softmax(-1), there
            first += length
