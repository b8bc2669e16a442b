"""From token log-probs to what a step adds to its loss: the options applied to the method.

    token log-probs -> means -> PMI, gamma -> loss          RMiPO and its nearest: `ops.pair_loss`
    token log-probs -> sums, reference's sums -> loss       the others: `methods.formulas`

This file only decides what these are given: which prior (live, cached or none), which reference and
which constants.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from rmipo_lite.config import RMiPOConfig
from rmipo_lite.data.length_balance import LengthBalance, fit_length_balance
from rmipo_lite.methods.memory import Memory
from rmipo_lite.methods.sums import PairSums, pair_sums, sequence_sums
from rmipo_lite.methods.table import SumLoss
from rmipo_lite.ops import PairLossOutput, pair_loss
from rmipo_lite.ops.devices import in_float64
from rmipo_lite.ops.losses import Loss
from rmipo_lite.tokens.pair import TokenizedPair

# Mean nats per token of both sides, NaN where a response has no scored token.
SideMeans = dict[int, tuple[float, float]]  # row of the dataset -> (chosen, rejected)


def pairs_digest(pairs: Sequence[TokenizedPair]) -> str:
    """Which pairs cached priors belong to: their rows and responses."""
    found = hashlib.sha256()
    for pair in pairs:
        found.update(json.dumps([pair.row, pair.chosen_ids, pair.rejected_ids]).encode())
    return found.hexdigest()


Rewards = tuple[Tensor, Tensor]  # (P,) each, chosen and rejected, detached


def losses(
    token_logps: Tensor,  # (N,) nats, sequences C1 R1 C2 R2 ...
    cu_seqlens: Tensor,  # (2P + 1,) int32
    prior: tuple[Tensor, Tensor] | None,  # (M,) nats and (2P + 1,) int32; None: no prior pass
    args: RMiPOConfig,
    reference: Tensor | None = None,  # (2P,) float64, the reference's sums; None: without one
    solved: Tensor | None = None,  # (P, 3) float64, what `solve` found of these pairs
    memory: Memory | None = None,  # of methods that have one
    labels: Tensor | None = None,  # (P,), of unpaired rows
) -> tuple[PairLossOutput, Rewards]:
    """Loss and its parts for every pair, with the run's options, and both sides' rewards."""
    method = args.loss
    if isinstance(method, SumLoss):
        return _of_sums(method, token_logps, cu_seqlens, reference, solved, memory, labels, args)
    prior_logps, prior_cu_seqlens = (None, None) if prior is None else prior
    if prior_logps is not None:  # a cached or an empty one is float32, whatever the model is
        prior_logps = prior_logps.to(token_logps.dtype)
    out = pair_loss(
        token_logps,
        cu_seqlens,
        prior_logps,
        prior_cu_seqlens,
        **args.pair_options._asdict(),
        impl=args.kernel_impl,
    )
    rewards = reward_scale(method, args) * out.logps.detach()
    return out, (rewards[0::2], rewards[1::2])


def reward_scale(loss: Loss, args: RMiPOConfig) -> float:
    """Of rewards to mean log-probs, in a loss of means."""
    return args.beta if loss.beta_in_rewards else 1.0


def _of_sums(
    method: SumLoss,
    token_logps: Tensor,
    cu_seqlens: Tensor,
    reference: Tensor | None,
    solved: Tensor | None,
    memory: Memory | None,
    labels: Tensor | None,
    args: RMiPOConfig,
) -> tuple[PairLossOutput, Rewards]:
    sums = sequence_sums(token_logps, cu_seqlens, args.ld_alpha)
    if reference is None and method.needs_reference:
        reference = sums  # a model that nobody trains is its own
    pairs = pair_sums(sums, cu_seqlens, reference, labels=labels)
    if solved is None:
        # Where no gradient is wanted nothing is trained, and nothing remembered.
        training = torch.is_grad_enabled()
        loss = _formula(method, pairs, args, memory, training).to(token_logps)
    else:  # the value is the loss, the gradient that of the step's loss
        known = solved.to(sums)
        pull = (known[:, 1:].flatten() * sums).view(-1, 2).sum(1)
        loss = (known[:, 0] + pull - pull.detach()).to(token_logps)
    rewards = (side.detach().to(token_logps) for side in method.rewards(pairs, args.method_options))
    whole = sequence_sums(token_logps.detach(), cu_seqlens)
    means = (whole / cu_seqlens.to(whole.device).diff()).to(token_logps)
    none = torch.zeros_like(loss.detach())
    return PairLossOutput(loss, none, none, means, None), (next(rewards), next(rewards))


def labels_of(pairs: Sequence[TokenizedPair]) -> Tensor | None:
    """(P,) 1 and 0 of unpaired rows, whose labels are true and false; None of pairs.

    Raises:
        ValueError: both stand together.
    """
    labels = [pair.label for pair in pairs]
    if all(label is None for label in labels):
        return None
    if any(label is None for label in labels):
        raise ValueError("pairs: wanted pairs or unpaired rows, got both")
    return torch.tensor(labels, dtype=torch.float64)


def memory_of(args: RMiPOConfig) -> Memory | None:
    """What the run's method remembers, at the beginning; None where it remembers nothing."""
    remembers = args.loss.remembers
    return remembers and Memory(remembers, args.method_options, int(args.seed))


def _formula(
    method: SumLoss, pairs: PairSums, args: RMiPOConfig, memory: Memory | None, training: bool
) -> Tensor:
    if memory is None:
        return method.formula(pairs, args.method_options)
    terms = memory.terms(pairs) if training else memory.at_rest(pairs)
    return method.formula(pairs, args.method_options, terms)


def solve(
    sums: Tensor,  # (2P,) float64, of all pairs of an optimizer step
    lengths: Tensor,  # (2P,) scored tokens
    reference: Tensor | None,  # (2P,) float64; None: the model is its own
    args: RMiPOConfig,
    memory: Memory | None = None,
    signs: Tensor | None = None,  # (P,), of methods that look at logits
    labels: Tensor | None = None,  # (P,), of unpaired rows
    *,
    training: bool = True,
) -> Tensor:
    """(P, 3) float64: every pair's loss, and the derivatives of their sum in both its sides.

    For methods whose pairs aren't apart: the micro-steps of a step then are.
    """
    method = args.loss
    assert isinstance(method, SumLoss)
    with torch.enable_grad():
        leaf = sums.detach().requires_grad_()
        borders = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        if reference is None and method.needs_reference:
            reference = leaf.detach()
        pairs = pair_sums(leaf, borders, reference, signs, labels)
        loss = _formula(method, pairs, args, memory, training)
        (slopes,) = torch.autograd.grad(loss.sum(), leaf)
    return torch.cat([loss.detach()[:, None], slopes.view(-1, 2)], dim=1)


def balance_of(
    pairs: Sequence[TokenizedPair], args: RMiPOConfig
) -> tuple[LengthBalance | None, dict[int, float] | None]:
    """What length says of the labels, and the weights by row where that is undone."""
    if args.loss.unpaired:
        return None, None
    lengths = [(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs]
    chosen, rejected = [both[0] for both in lengths], [both[1] for both in lengths]
    found = fit_length_balance(chosen, rejected)
    if found is None or args.length_balance == "off" or not found.is_used:
        return found, None
    weights = found.weights(chosen, rejected)
    return found, {pair.row: weight for pair, weight in zip(pairs, weights, strict=True)}


def cached_prior(
    rows: Sequence[int], cache: SideMeans, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The cached means of these rows in the operator's form: one token per defined sequence."""
    means = [mean for row in rows for mean in cache[row]]
    defined = [mean for mean in means if not math.isnan(mean)]
    borders = list(accumulate((int(not math.isnan(mean)) for mean in means), initial=0))
    return (
        torch.tensor(defined, dtype=torch.float32, device=device),
        torch.tensor(borders, dtype=torch.int32, device=device),
    )


def side_means(
    pairs: Sequence[TokenizedPair], token_logps: Tensor, cu_seqlens: Tensor
) -> SideMeans:
    """The means of these pairs' sequences C1 R1 C2 R2 ..., by row."""
    totals = [0.0, *in_float64(token_logps).cumsum(0).tolist()]
    means = [
        (totals[end] - totals[start]) / (end - start) if end > start else math.nan
        for start, end in pairwise(cu_seqlens.tolist())
    ]
    return {
        pair.row: (chosen, rejected)
        for pair, chosen, rejected in zip(pairs, means[0::2], means[1::2], strict=True)
    }


def chosen_token_nll(token_logps: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Summed negative log-probability of all chosen tokens, () nats, for `sft_weight`."""
    lengths = cu_seqlens.diff().long()
    is_chosen = torch.arange(len(lengths), device=lengths.device) % 2 == 0
    # Sequences tile the tokens, so the flag of each sequence repeats over its length.
    chosen = torch.repeat_interleave(is_chosen, lengths, output_size=token_logps.shape[0])
    # Not token_logps[chosen]: on a GPU that waits until it is known how many there are.
    return -torch.where(chosen, token_logps, 0.0).sum()
