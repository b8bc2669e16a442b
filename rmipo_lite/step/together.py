"""A step's pairs taken together, ahead of its micro-steps: for methods whose pairs aren't apart."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rmipo_lite.config import RMiPOConfig
from rmipo_lite.methods.memory import Memory
from rmipo_lite.methods.sums import sequence_sums
from rmipo_lite.model.backbone import evaluating
from rmipo_lite.model.batch import ModelInput
from rmipo_lite.model.head import ModelHead
from rmipo_lite.step.losses import labels_of, solve
from rmipo_lite.step.perturbed import perturbed_signs
from rmipo_lite.step.reference import Reference
from rmipo_lite.tokens.pair import TokenizedPair

States = Callable[[Sequence[TokenizedPair]], tuple[Tensor, ModelHead, ModelInput]]


@torch.no_grad()
def solve_step(
    parts: Sequence[Sequence[TokenizedPair]],
    states: States,
    args: RMiPOConfig,
    reference: Reference | None,
    memory: Memory | None,
) -> dict[int, Tensor]:
    """What `step.losses.solve` finds of a step's pairs, (3,) float64 by row.

    Args:
        parts: the step's micro-steps.
        states: hidden rows, head and input of one of them, as training passes it.
        args: the run's options.
        reference: where the method has one, which knows the pairs.
        memory: where the method has one.
    """
    sums, lengths, signs = [], [], []
    for part in parts:
        hidden, head, policy = states(part)
        logps = head.token_logps(hidden, policy.target_ids, args.kernel_impl)
        sums.append(sequence_sums(logps, policy.cu_seqlens, args.ld_alpha))
        lengths.append(policy.cu_seqlens.diff().to(sums[-1].device))
        if args.loss.needs_logits:
            assert reference is not None
            signs.append(_signs(part, hidden, head, policy, reference, args))
    pairs = [pair for part in parts for pair in part]
    known = None if reference is None else reference.sums(pairs)
    signs_of_all = torch.cat(signs) if signs else None
    solved = solve(
        torch.cat(sums), torch.cat(lengths), known, args, memory, signs_of_all, labels_of(pairs)
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
