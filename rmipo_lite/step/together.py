"""A step's pairs taken together: what all of them must be known for, and what processes did of it.

Some methods' pairs aren't apart (`methods.table`): each pulls by what the others are, so that all
are passed once ahead of the micro-steps. Where several processes share a step, what each computed
of it is added up here, and is the same on all of them afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from rmipo_lite.config import RMiPOConfig
from rmipo_lite.methods.memory import Memory
from rmipo_lite.methods.sums import sequence_sums
from rmipo_lite.model import batch
from rmipo_lite.model.backbone import evaluating
from rmipo_lite.model.batch import ModelInput
from rmipo_lite.model.head import ModelHead
from rmipo_lite.parallel.group import Group
from rmipo_lite.step.losses import labels_of, solve
from rmipo_lite.step.pair_values import PairValues, StepOutcome, concat
from rmipo_lite.step.perturbed import perturbed_signs
from rmipo_lite.step.reference import Reference
from rmipo_lite.tokens.pair import TokenizedPair

States = Callable[[Sequence[TokenizedPair]], tuple[Tensor, ModelHead, ModelInput]]
Sums = dict[int, tuple[float, float, float]]  # by row: chosen, rejected, sign
_FIELDS = tuple(PairValues.__dataclass_fields__)


def share_of(group: Group, pairs: Sequence[TokenizedPair]) -> list[TokenizedPair]:
    """The pairs that this process computes: all processes have about as many tokens."""
    if group.size == 1:
        return list(pairs)
    costs = [
        batch.packed_length(pair) + len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs
    ]
    return [pairs[place] for place in group.share(costs)]


@torch.no_grad()
def sums_of(
    parts: Sequence[Sequence[TokenizedPair]],
    states: States,
    args: RMiPOConfig,
    reference: Reference | None,
) -> Sums:
    """Log-probs of both sides of every pair, and the signs of a method that looks at logits.

    Args:
        parts: micro-steps.
        states: hidden rows, head and input of one of them, as training passes it.
        args: the run's options.
        reference: where the method has one.
    """
    found: Sums = {}
    for part in parts:
        hidden, head, policy = states(part)
        logps = head.token_logps(hidden, policy.target_ids, args.kernel_impl)
        sides = sequence_sums(logps, policy.cu_seqlens, args.ld_alpha).tolist()
        signs = [0.0] * len(part)
        if args.loss.needs_logits:
            assert reference is not None
            signs = _signs(part, hidden, head, policy, reference, args).tolist()
        numbers = zip(part, sides[0::2], sides[1::2], signs, strict=True)
        found |= {pair.row: (chosen, rejected, sign) for pair, chosen, rejected, sign in numbers}
    return found


def solved_of(
    pairs: Sequence[TokenizedPair],
    sums: Sums,
    args: RMiPOConfig,
    reference: Tensor | None,  # (2P,) float64, where the method has one
    memory: Memory | None,
) -> dict[int, Tensor]:
    """What `step.losses.solve` finds of a step's pairs, (3,) float64 by row."""
    numbers = torch.tensor([sums[pair.row] for pair in pairs], dtype=torch.float64)
    lengths = torch.tensor([length for pair in pairs for length in batch.scored_lengths(pair)])
    signs = numbers[:, 2] if args.loss.needs_logits else None
    solved = solve(
        numbers[:, :2].flatten(), lengths, reference, args, memory, signs, labels_of(pairs)
    )
    return {pair.row: row for pair, row in zip(pairs, solved, strict=True)}


def _signs(
    part: Sequence[TokenizedPair],
    hidden: Tensor,
    head: ModelHead,
    policy: ModelInput,
    reference: Reference,
    args: RMiPOConfig,
) -> Tensor:
    """Of epsilon-DPO, (P,): both models' logits side by side."""
    if head.weight.requires_grad:  # the reference's stands in the same place
        head = head.copied()
    with reference.in_force(), evaluating(reference.step.model):
        other_hidden, other_head, _ = reference.step.states(part)
        return perturbed_signs(
            hidden, head, other_hidden, other_head, policy.target_ids, policy.cu_seqlens,
            args.epsilon or 0.0, args.ld_alpha,
        )  # fmt: skip


def outcome_of_all(
    group: Group,
    model: nn.Module,
    own: StepOutcome,
    pairs: Sequence[TokenizedPair],
    weights: Mapping[int, float] | None,
) -> StepOutcome:
    """A step's outcome from what every process computed of it; the gradients are added up too."""
    if group.size == 1:
        return own
    group.add_gradients(model)
    totals = torch.tensor([float(own.loss), own.num_tokens, len(own.end_nll)], dtype=torch.float64)
    loss, num_tokens, ends = group.add(totals).tolist()
    columns = {}
    if own.values:
        columns = {name: getattr(concat(own.values), name) for name in _FIELDS}
        columns["end"] = torch.cat(own.end_nll) if own.end_nll else torch.zeros(len(own.rows))
    table = _table(group, own.rows, columns, pairs, own.loss)
    end_nll = [table.pop("end")] if ends else []
    return StepOutcome(
        loss=torch.full_like(own.loss, loss),
        values=[PairValues(**{name: table[name] for name in _FIELDS})],
        rows=[pair.row for pair in pairs],
        weights=[1.0 if weights is None else weights[pair.row] for pair in pairs],
        end_nll=end_nll,
        num_tokens=int(num_tokens),
        num_pairs=own.num_pairs,
    )


def evaluated_by_all(
    group: Group,
    parts: Sequence[tuple[list[TokenizedPair], PairValues]],
    pairs: Sequence[TokenizedPair],
    like: Tensor,
) -> PairValues:
    """The values of all pairs, of which `parts` are this process's; `like`: of their kind."""
    rows = [pair.row for part, _ in parts for pair in part]
    columns = {}
    if parts:
        whole = concat([values for _, values in parts])
        columns = {name: getattr(whole, name) for name in _FIELDS}
    table = _table(group, rows, columns, pairs, like)
    return PairValues(**{name: table[name] for name in _FIELDS})


def _table(
    group: Group,
    rows: Sequence[int],
    columns: Mapping[str, Tensor],
    pairs: Sequence[TokenizedPair],
    like: Tensor,
) -> dict[str, Tensor]:
    """Columns of all pairs in their order: every process fills its lines, and zeros add nothing."""
    names = (*_FIELDS, "end")
    table = torch.zeros(len(pairs), len(names), dtype=torch.float64)
    if columns:
        place = {pair.row: number for number, pair in enumerate(pairs)}
        places = torch.tensor([place[row] for row in rows])
        for column, name in enumerate(names):
            if name in columns:
                table[places, column] = columns[name].double().cpu()
    table = group.add(table).to(like.device, like.dtype)
    return dict(zip(names, table.unbind(1), strict=True))
