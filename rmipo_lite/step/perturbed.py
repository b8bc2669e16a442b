"""epsilon-DPO's question to a pair: what a small step to or from the reference model does to it.

A policy with a little more or less of the penalty has logits (1 +- e) z -+ e z_ref (Lee et al.
2025, arXiv 2502.13177, equations 3 and 4). Where the log-ratio of chosen over rejected rises with
the one and falls with the other, the pair's sign is 1, the other way round -1, else 0.
"""

import torch
from torch import Tensor

from rmipo_lite.methods.sums import sequence_sums
from rmipo_lite.model.head import ModelHead

_LOGITS_AT_ONCE = 2**24  # numbers; each is held a few times


@torch.no_grad()
def perturbed_signs(
    hidden: Tensor,  # (N, H) of the policy, sequences C1 R1 C2 R2 ...
    head: ModelHead,
    reference_hidden: Tensor,  # (N, H)
    reference_head: ModelHead,
    target_ids: Tensor,  # (N,)
    cu_seqlens: Tensor,  # (2P + 1,)
    epsilon: float,
    ld_alpha: float | None = None,
) -> Tensor:  # (P,) float64, -1, 0 or 1
    """The sign of every pair. Logits are held for some rows at a time."""
    rows = max(1, _LOGITS_AT_ONCE // len(head.weight))
    found = []
    for start in range(0, len(target_ids), rows):
        here = slice(start, start + rows)
        logits = head.logits(hidden[here])
        # As a step away from z: nothing but zeros where both models are one.
        apart = epsilon * (logits - reference_head.logits(reference_hidden[here]))
        found.append(
            [
                (logits + way * apart).log_softmax(-1).gather(1, target_ids[here, None])[:, 0]
                for way in (-1, 0, 1)
            ]
        )
    ratios = []
    for logps in zip(*found, strict=True):
        sums = sequence_sums(torch.cat(logps), cu_seqlens, ld_alpha)
        ratios.append(sums[0::2] - sums[1::2])
    less, same, more = ratios
    rises, falls = (more > same) & (same > less), (more < same) & (same < less)
    return rises.to(same) - falls.to(same)
