"""The operators in float64, written apart from `ops/reference.py`: what the kernels are held to.

The head's gradient is written out by hand, the pair loss in Python floats, a pair at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rmipo_lite.ops.reference import IGNORED
from tests.trials.numbers.operands import HeadCase


@dataclass(frozen=True)
class HeadTruth:
    """Log-probs and gradients of sum(upstream * logps), each with the size of what it sums.

    A sum can't be told more exactly than rounding its largest terms allows.
    """

    logps: Tensor  # (N,)
    largest_logit: float
    largest_terms: float  # of a logit's product
    hidden: Tensor  # (N, H)
    hidden_terms: Tensor
    weight: Tensor  # (V, H)
    weight_terms: Tensor
    bias: Tensor  # (V,)
    bias_terms: Tensor


def head_truth(case: HeadCase, upstream: Tensor) -> HeadTruth:
    """Float64 log-probs and gradients of the inputs as they are rounded."""
    hidden, weight = case.hidden.double(), case.weight.double()
    logits = case.products()
    if case.bias is not None:
        logits = logits + case.bias.double()
    logits = logits * case.logit_scale
    slope = torch.full_like(logits, case.logit_scale)
    if case.logit_softcap is not None:
        bent = torch.tanh(logits / case.logit_softcap)
        logits, slope = case.logit_softcap * bent, slope * (1 - bent * bent)
    probabilities, logps = torch.zeros_like(logits), torch.zeros(len(logits), dtype=torch.float64)
    of_target = torch.zeros_like(logits)
    for row, target in enumerate(case.target_ids.tolist()):
        if target == IGNORED:
            continue
        largest = logits[row].max()
        exponentials = torch.exp(logits[row] - largest)
        probabilities[row] = exponentials / exponentials.sum()
        logps[row] = logits[row, target] - largest - torch.log(exponentials.sum())
        of_target[row, target] = 1.0
    grads = upstream.double()[:, None] * slope * (of_target - probabilities)
    # Without the softcap's slope 1 - tanh^2, which near 0 is a difference of nearly equal numbers.
    sizes = (upstream.double()[:, None] * case.logit_scale).abs() * (of_target + probabilities)
    return HeadTruth(
        logps=logps,
        largest_logit=_largest(logits),
        largest_terms=_largest(hidden.abs() @ weight.abs().T) * case.logit_scale,
        hidden=grads @ weight,
        hidden_terms=sizes @ weight.abs(),
        weight=grads.T @ hidden,
        weight_terms=sizes.T @ hidden.abs(),
        bias=grads.sum(0),
        bias_terms=sizes.sum(0),
    )


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


@dataclass(frozen=True)
class PairTruth:
    """One pair's loss and what it is made of."""

    loss: float
    gamma: float
    pmi_gap: float
    grad_chosen: float  # d loss / d mean of the chosen response
    grad_rejected: float


@dataclass(frozen=True)
class Formula:
    """Which loss, with which constants."""

    loss_type: str = "rmipo"
    beta: float = 2.0
    gamma_min: float = 0.3
    gamma_max: float = 1.6
    gamma_scaled_by_beta: bool = False
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.5


def mean(values: Sequence[float]) -> float:
    """Mean, exactly summed; NaN of nothing."""
    return math.fsum(values) / len(values) if values else math.nan


def softplus(x: float) -> float:
    """log(1 + exp(x)) without overflow."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)) without overflow."""
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


def pair_truth(
    means: tuple[float, float], priors: tuple[float, float], formula: Formula
) -> PairTruth:
    """Loss of one pair from means (chosen, rejected); a prior of NaN is one that isn't there."""
    f = formula
    (chosen, rejected), (chosen_prior, rejected_prior) = means, priors
    gap = (chosen - chosen_prior) - (rejected - rejected_prior)
    if math.isnan(chosen_prior) or math.isnan(rejected_prior):
        gap = 0.0
    gamma = f.simpo_gamma
    if f.loss_type == "rmipo":
        gamma = f.gamma_min + (f.gamma_max - f.gamma_min) * math.exp(-max(0.0, gap))
    if f.loss_type == "simper":
        up, down = math.exp(chosen), math.exp(rejected)
        return PairTruth(down - up, 0.0, gap, -up, down)
    difference = chosen - rejected
    if f.loss_type == "rmipo" and f.gamma_scaled_by_beta:
        margin = f.beta * (difference - gamma)
    else:
        margin = f.beta * difference - gamma
    if f.loss_type == "hinge":
        slope = -f.beta if margin < 1 else 0.0
        return PairTruth(max(0.0, 1 - margin), gamma, gap, slope, -slope)
    e = f.label_smoothing
    loss = (1 - e) * softplus(-margin) + e * softplus(margin)
    slope = f.beta * (e * sigmoid(margin) - (1 - e) * sigmoid(-margin))
    return PairTruth(loss, gamma, gap, slope, -slope)
