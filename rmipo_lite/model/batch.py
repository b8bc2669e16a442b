"""Pairs of token lists -> the rows a model reads, packed or padded.

Both forms are a `ModelInput` and end in the same thing: `logit_rows`, the hidden row that predicts
each scored token, in the order C1 R1 C2 R2 ..., with `cu_seqlens` as the borders. What follows
(head, loss, metrics) therefore doesn't know which form ran.

Packed: one row `[P1 C1 R1 P2 C2 R2 ...]` without padding, every prompt once. The last token of each
response predicts nothing that is scored, so it isn't fed at all; the hidden row of a prompt's last
token is read twice, once for each response.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from rmipo_lite.tokens.pair import TokenizedPair


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of row positions that attends to itself causally and to all of an earlier prefix.

    The prefix is empty or the beginning of an earlier segment.
    """

    start: int
    end: int
    prefix_start: int
    prefix_end: int

    @property
    def prefix_len(self) -> int:
        """Tokens of the prefix."""
        return self.prefix_end - self.prefix_start


@dataclass(frozen=True)
class SegmentPlan:
    """Who attends to whom in a packed row. Segments tile the row from left to right.

    `built` holds what attention's first layer makes of it for the layers after it.
    """

    segments: tuple[Segment, ...]
    built: dict[Any, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class ModelInput:
    """One forward pass. B rows of T tokens, N scored tokens in S sequences."""

    input_ids: Tensor  # (B, T) int64
    position_ids: Tensor | None  # (B, T) int64; None when padded: the model counts itself
    attention_mask: Tensor | None  # (B, T) int64, 1 = real token; None when packed
    plan: SegmentPlan | None  # None when padded
    logit_rows: Tensor  # (N,) int64, index into the B * T hidden rows
    target_ids: Tensor  # (N,) int64
    cu_seqlens: Tensor  # (S + 1,) int32, borders of the sequences among the N scored tokens

    @property
    def num_tokens(self) -> int:
        """Tokens that the model reads, padding included."""
        return self.input_ids.numel()

    def to(self, device: torch.device) -> ModelInput:
        """Copy to a device, without waiting for the copy where the memory is pinned.

        Apple's GPUs read this memory later than that, when it may hold something else.
        """
        moved = {
            name: value.to(device, non_blocking=device.type == "cuda")
            for name in (
                "input_ids",
                "position_ids",
                "attention_mask",
                "logit_rows",
                "target_ids",
                "cu_seqlens",
            )
            if (value := getattr(self, name)) is not None
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class _Sequence:
    """One scored sequence: `context` conditions, `response` is scored as far as it has one."""

    context: list[int]
    response: list[int]

    @property
    def fed(self) -> list[int]:
        return (self.context + self.response)[:-1]

    @property
    def scored(self) -> list[int]:
        # Without any context the first token has no predecessor and can't be scored.
        return self.response if self.context else self.response[1:]


def sides(pair: TokenizedPair) -> tuple[_Sequence, _Sequence]:
    """Chosen and rejected sequence of a pair, each with its prompt."""
    rejected_prompt = pair.rejected_prompt_ids
    if rejected_prompt is None:
        rejected_prompt = pair.prompt_ids
    return (
        _Sequence(pair.prompt_ids, pair.chosen_ids),
        _Sequence(rejected_prompt, pair.rejected_ids),
    )


def scored_lengths(pair: TokenizedPair) -> tuple[int, int]:
    """Scored tokens of the chosen and the rejected response, given the prompt."""
    chosen, rejected = sides(pair)
    return len(chosen.scored), len(rejected.scored)


def prior_lengths(pair: TokenizedPair, front: Sequence[int] = ()) -> tuple[int, int]:
    """Scored tokens of the bare chosen and rejected response behind `front`."""
    chosen, rejected = (
        _Sequence(list(front), response) for response in (pair.chosen_ids, pair.rejected_ids)
    )
    return len(chosen.scored), len(rejected.scored)


def bare(pair: TokenizedPair) -> TokenizedPair:
    """The pair without its prompts, as the prior reads it."""
    return replace(pair, prompt_ids=[], rejected_prompt_ids=None)


def cut_short(pair: TokenizedPair, tokens: int) -> TokenizedPair:
    """At most so many tokens of each part: a prompt's last ones, a response's first."""
    return replace(
        pair,
        prompt_ids=pair.prompt_ids[-tokens:],
        chosen_ids=pair.chosen_ids[:tokens],
        rejected_ids=pair.rejected_ids[:tokens],
    )


def packed_length(pair: TokenizedPair) -> int:
    """Tokens this pair adds to a packed row."""
    return len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids) - 2


def padded_length(pair: TokenizedPair) -> int:
    """Tokens of the longer side, as a padded row holds it."""
    return max(len(side.fed) for side in sides(pair))


def micro_step_tokens(pairs: Sequence[TokenizedPair], packing: bool) -> int:
    """Tokens that these pairs take in one policy pass, padding included."""
    if packing:
        return sum(packed_length(pair) for pair in pairs)
    return 2 * len(pairs) * max((padded_length(pair) for pair in pairs), default=0)


def split_by_budget(
    pairs: Sequence[TokenizedPair], max_tokens: int, packing: bool
) -> list[list[TokenizedPair]]:
    """Cut a step's pairs into micro-steps of at most `max_tokens` tokens, the longest first.

    Pairs of similar length meet, so that padded rows hold little padding, and what doesn't fit the
    memory shows at once; inside a micro-step they keep the order they came in. A pair that alone is
    longer than the budget gets a micro-step of its own: it can't be cut further.
    """
    length = packed_length if packing else padded_length
    groups: list[list[int]] = []
    cost = 0
    for index in sorted(range(len(pairs)), key=lambda i: length(pairs[i]), reverse=True):
        # Padded, a row is as long as the group's longest pair; packed, each adds its own length.
        widest = index if packing or not groups else groups[-1][0]
        added = micro_step_tokens([pairs[widest]], packing)
        if groups and cost + added <= max_tokens:
            groups[-1].append(index)
            cost += added
        else:
            groups.append([index])
            cost = micro_step_tokens([pairs[index]], packing)
    return [[pairs[index] for index in sorted(group)] for group in groups]


def policy_input(pairs: Sequence[TokenizedPair], packing: bool, pad_id: int = 0) -> ModelInput:
    """The responses given their prompts.

    Raises:
        ValueError: packing was asked for a pair whose two sides have different prompts.
    """
    if packing:
        return _pack_shared(pairs)
    return _pad([side for pair in pairs for side in sides(pair)], pad_id)


def prior_input(
    pairs: Sequence[TokenizedPair], packing: bool, front: Sequence[int] = (), pad_id: int = 0
) -> ModelInput:
    """The bare responses, each a text of its own from position 0.

    `front` stands before each, and every token of it is scored; without one the score begins at
    the second token, and a response of one token has none.
    """
    context = list(front)
    sequences = [
        _Sequence(context, response)
        for pair in pairs
        for response in (pair.chosen_ids, pair.rejected_ids)
    ]
    return _pack(sequences) if packing else _pad(sequences, pad_id)


def _pack_shared(pairs: Sequence[TokenizedPair]) -> ModelInput:
    row: list[int] = []
    positions: list[int] = []
    logit_rows: list[int] = []
    segments: list[Segment] = []
    sequences: list[_Sequence] = []
    for pair in pairs:
        if pair.rejected_prompt_ids is not None:
            raise ValueError(
                f"packing: row {pair.row} has one prompt for the chosen and another for the "
                "rejected response; such pairs need packing=False"
            )
        chosen, rejected = sides(pair)
        prompt_len, start = len(pair.prompt_ids), len(row)
        row += chosen.fed
        positions += range(len(chosen.fed))
        # [P C] is one causal text; R reads P as its prefix and never C.
        middle = len(row)
        segments.append(Segment(start, middle, start, start))
        row += pair.rejected_ids[:-1]
        positions += range(prompt_len, prompt_len + len(pair.rejected_ids) - 1)
        if len(row) > middle:
            segments.append(Segment(middle, len(row), start, start + prompt_len))
        last_prompt = [start + prompt_len - 1] if prompt_len else []
        logit_rows += last_prompt + list(range(start + prompt_len, middle))
        logit_rows += last_prompt + list(range(middle, len(row)))
        sequences += [chosen, rejected]
    return _packed(row, positions, segments, logit_rows, sequences)


def _pack(sequences: Sequence[_Sequence]) -> ModelInput:
    row: list[int] = []
    positions: list[int] = []
    logit_rows: list[int] = []
    segments: list[Segment] = []
    for sequence in sequences:
        fed, start = sequence.fed, len(row)
        if not fed:
            continue
        row += fed
        positions += range(len(fed))
        segments.append(Segment(start, len(row), start, start))
        logit_rows += range(len(row) - len(sequence.scored), len(row))
    return _packed(row, positions, segments, logit_rows, sequences)


def _packed(
    row: list[int],
    positions: list[int],
    segments: list[Segment],
    logit_rows: list[int],
    sequences: Sequence[_Sequence],
) -> ModelInput:
    return ModelInput(
        input_ids=torch.tensor([row], dtype=torch.int64),
        position_ids=torch.tensor([positions], dtype=torch.int64),
        attention_mask=None,
        plan=SegmentPlan(tuple(segments)),
        logit_rows=torch.tensor(logit_rows, dtype=torch.int64),
        target_ids=_targets(sequences),
        cu_seqlens=borders(len(s.scored) for s in sequences),
    )


def _pad(sequences: Sequence[_Sequence], pad_id: int) -> ModelInput:
    # At least one column: a model can't read an empty row (every response has one token).
    width = max([1, *(len(s.fed) for s in sequences)])
    input_ids = torch.full((len(sequences), width), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros((len(sequences), width), dtype=torch.int64)
    logit_rows: list[int] = []
    for i, sequence in enumerate(sequences):
        fed = sequence.fed
        input_ids[i, : len(fed)] = torch.tensor(fed, dtype=torch.int64)
        # Padding stands on the right, where no causal model looks at it. A row without any token
        # keeps one unmasked: some attention kernels turn an all-masked row into NaN.
        attention_mask[i, : max(1, len(fed))] = 1
        end = i * width + len(fed)
        logit_rows += range(end - len(sequence.scored), end)
    return ModelInput(
        input_ids=input_ids,
        position_ids=None,
        attention_mask=attention_mask,
        plan=None,
        logit_rows=torch.tensor(logit_rows, dtype=torch.int64),
        target_ids=_targets(sequences),
        cu_seqlens=borders(len(s.scored) for s in sequences),
    )


def _targets(sequences: Iterable[_Sequence]) -> Tensor:
    return torch.tensor([t for s in sequences for t in s.scored], dtype=torch.int64)


def borders(lengths: Iterable[int]) -> Tensor:
    """(S + 1,) int32, borders of S sequences of these lengths."""
    return torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32)
