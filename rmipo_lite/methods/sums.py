"""From token log-probs to the sums that the neighbours' losses take, with their gradient.

Everything is float64 whatever comes in: P numbers cost nothing. Where the device has no float64 it
is computed on the CPU.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rmipo_lite.ops.devices import in_float64


class PairSums(NamedTuple):
    """Log-probs of both sides of P pairs, summed over their tokens, in nats; float64."""

    chosen: Tensor  # (P,) under the policy
    rejected: Tensor  # (P,)
    chosen_length: Tensor  # (P,) scored tokens
    rejected_length: Tensor  # (P,)
    chosen_reference: Tensor  # (P,) under the reference, no gradient; 0 without one
    rejected_reference: Tensor  # (P,)
    signs: Tensor | None = None  # (P,) -1, 0 or 1: `step.perturbed`, where a method asks for it
    labels: Tensor | None = None  # (P,) of unpaired rows: 1 where the chosen side is the row's own

    def detached(self) -> "PairSums":
        """The same numbers without a gradient."""
        return PairSums(*(part if part is None else part.detach() for part in self))  # type: ignore[arg-type]

    @property
    def chosen_ratio(self) -> Tensor:
        """log pi(chosen) - log ref(chosen), (P,)."""
        return self.chosen - self.chosen_reference

    @property
    def rejected_ratio(self) -> Tensor:
        """Likewise of the rejected side, (P,)."""
        return self.rejected - self.rejected_reference

    @property
    def gap(self) -> Tensor:
        """The chosen side's ratio over the rejected one's, (P,)."""
        return self.chosen_ratio - self.rejected_ratio

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """Nats per token under the policy, (P,) each."""
        return self.chosen / self.chosen_length, self.rejected / self.rejected_length

    @property
    def mean_gap(self) -> Tensor:
        """`gap` of means over tokens, (P,)."""
        chosen = self.chosen_ratio / self.chosen_length
        return chosen - self.rejected_ratio / self.rejected_length


def sequence_sums(
    token_logps: Tensor,  # (N,) nats
    cu_seqlens: Tensor,  # (2P + 1,) int32, sequences C1 R1 C2 R2 ...
    ld_alpha: float | None = None,
) -> Tensor:  # (2P,) float64
    """Sums over the tokens of every sequence.

    With `ld_alpha` (LD-DPO, arXiv 2409.06411) tokens past the shorter side's length count that much
    and no more.
    """
    logps = in_float64(token_logps)
    lengths = cu_seqlens.to(logps.device).diff().long()
    if ld_alpha is not None:
        logps = logps * _tail_weights(lengths, ld_alpha)
    return torch.segment_reduce(logps, "sum", lengths=lengths, axis=0, unsafe=True)


def _tail_weights(lengths: Tensor, ld_alpha: float) -> Tensor:
    """(N,) 1 within the length that both sides have, `ld_alpha` after it."""
    shared = lengths.view(-1, 2).amin(dim=1).repeat_interleave(2)
    first = lengths.cumsum(0) - lengths
    place = torch.arange(int(lengths.sum()), device=lengths.device)
    place = place - first.repeat_interleave(lengths)
    weights = torch.full(place.shape, ld_alpha, dtype=torch.float64, device=lengths.device)
    return weights.masked_fill(place < shared.repeat_interleave(lengths), 1.0)


def pair_sums(
    sums: Tensor,
    cu_seqlens: Tensor,
    reference: Tensor | None = None,
    signs: Tensor | None = None,
    labels: Tensor | None = None,
) -> PairSums:
    """Both sides of every pair from sums C1 R1 C2 R2 ..., (2P,), and the reference's."""
    lengths = cu_seqlens.to(sums.device).diff().to(sums.dtype)
    known = torch.zeros_like(sums) if reference is None else reference.to(sums)
    known = known.detach()
    return PairSums(
        sums[0::2], sums[1::2], lengths[0::2], lengths[1::2], known[0::2], known[1::2],
        *(None if part is None else part.to(sums) for part in (signs, labels)),
    )  # fmt: skip
