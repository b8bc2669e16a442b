"""The neighbours' losses, each as its source has it: from sums of P pairs to P losses.

    W, L = log pi - log ref of chosen and rejected, summed over tokens      h = W - L
    S    = log pi, summed       m = S / tokens       G = h of means       sp = softplus

Where a published implementation overflows or loses digits the exact value stands here
(`tests/methods/test_golden.py`). Gradients are autograd's, in float64.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rmipo_lite.methods.sums import PairSums

_ROUNDING = 1e-4  # nats, of a response's summed log-probs in float32
_ALMOST_SURE = -1e-15  # nats per token: nearer to 0 the odds of a response leave float64


class MethodOptions(NamedTuple):
    """Constants of the methods; a method reads those that its entry in the table names."""

    beta: float
    label_smoothing: float
    simpo_gamma: float
    alpha: float
    dpop_lambda: float
    slic_delta: float
    beta_dpo_rho: float
    gamma_po_tau: float
    epsilon: float
    length_norm: bool
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


def logistic(z: Tensor, label_smoothing: float) -> Tensor:
    """(1 - e) sp(-z) + e sp(z)."""
    if not label_smoothing:  # not added where it is off: 0 * inf would be NaN
        return -F.logsigmoid(z)
    return -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)


def dpo(pairs: PairSums, o: MethodOptions) -> Tensor:
    """sp(-beta h), Rafailov et al. 2023 (arXiv 2305.18290); with label smoothing conservative."""
    return logistic(o.beta * pairs.gap, o.label_smoothing)


def robust(pairs: PairSums, o: MethodOptions) -> Tensor:
    """[(1-e) sp(-beta h) - e sp(beta h)] / (1 - 2e), Chowdhury et al. 2024 (arXiv 2403.00409)."""
    z, e = o.beta * pairs.gap, o.label_smoothing
    wrong = e * F.logsigmoid(-z) if e else 0.0
    return (wrong - (1 - e) * F.logsigmoid(z)) / (1 - 2 * e)


def dpo_norm(pairs: PairSums, o: MethodOptions) -> Tensor:
    """sp(-beta G): DPO of means over tokens."""
    return logistic(o.beta * pairs.mean_gap, o.label_smoothing)


def ipo(pairs: PairSums, o: MethodOptions) -> Tensor:
    """(G - 1 / (2 beta))^2, Azar et al. 2023 (arXiv 2310.12036), of means as its authors meant."""
    return (pairs.mean_gap - 1 / (2 * o.beta)).square()


def kto_pair(pairs: PairSums, o: MethodOptions) -> Tensor:
    """Half of sigma(-beta (W - KL_l)) and of sigma(-beta (KL_w - L)), KTO's early paired form.

    KL is the mean ratio of a side over the step's pairs, at least 0, and carries a gradient where
    it isn't below: a run begins at 0, and the rounding of a pass must not decide.
    """
    kl_chosen = _from_zero(pairs.chosen_ratio.mean())
    kl_rejected = _from_zero(pairs.rejected_ratio.mean())
    chosen = torch.sigmoid(-o.beta * (pairs.chosen_ratio - kl_rejected))
    return (chosen + torch.sigmoid(-o.beta * (kl_chosen - pairs.rejected_ratio))) / 2


def _from_zero(mean: Tensor) -> Tensor:
    """At least 0, with the gradient of what is 0 but for rounding."""
    held = mean + (mean.clamp(min=0.0) - mean).detach()
    return torch.where(mean > -_ROUNDING, held, mean.clamp(min=0.0))


def kto(pairs: PairSums, o: MethodOptions) -> Tensor:
    """l_D sigma(-beta (r - KL)) or l_U sigma(-beta (KL - r)), Ethayarajh et al. 2024 (2402.01306).

    Of unpaired rows: r is the ratio of a row's own completion, chosen where it is desirable. KL is
    the mean ratio of the mismatched completions on the rows' other sides, at least 0, no gradient.
    """
    assert pairs.labels is not None
    is_desirable = pairs.labels > 0
    own = torch.where(is_desirable, pairs.chosen_ratio, pairs.rejected_ratio)
    other = torch.where(is_desirable, pairs.rejected_ratio, pairs.chosen_ratio)
    gain = own - other.detach().mean().clamp(min=0.0)
    weights = gain.new_tensor([o.undesirable_weight, o.desirable_weight])
    weight = weights[is_desirable.long()]
    return weight * torch.sigmoid(-o.beta * torch.where(is_desirable, gain, -gain))


def _log_odds(mean: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = e^mean; what reaches p = 1 is held just below it."""
    mean = mean + (mean.clamp(max=_ALMOST_SURE) - mean).detach()
    return mean - torch.where(mean > -1, (-torch.expm1(mean)).log(), torch.log1p(-mean.exp()))


def orpo(pairs: PairSums, o: MethodOptions) -> Tensor:
    """beta sp(-(log odds of chosen over rejected)), Hong et al. 2024 (arXiv 2403.07691).

    Its other half, the chosen side's likelihood, is `sft_weight`.
    """
    chosen, rejected = pairs.means
    return -o.beta * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def cpo(pairs: PairSums, o: MethodOptions) -> Tensor:
    """sp(-beta (S_w - S_l)), Xu et al. 2024 (arXiv 2401.08417); its NLL is `sft_weight`."""
    return logistic(o.beta * (pairs.chosen - pairs.rejected), o.label_smoothing)


def dpo_hinge(pairs: PairSums, o: MethodOptions) -> Tensor:
    """relu(1 - beta h), as RSO (arXiv 2309.06657) has it."""
    return F.relu(1 - o.beta * pairs.gap)


def slic(pairs: PairSums, o: MethodOptions) -> Tensor:
    """relu(delta - beta (S_w - S_l)), Zhao et al. 2023 (arXiv 2305.10425), NLL as `sft_weight`."""
    return F.relu(o.slic_delta - o.beta * (pairs.chosen - pairs.rejected))


def _alpha_reward(mean: Tensor, alpha: float) -> Tensor:
    """(1 - p^-alpha) / alpha of p = e^mean; its limit at alpha 0 is the mean."""
    return -torch.expm1(-alpha * mean) / alpha if alpha else mean


def alphapo(pairs: PairSums, o: MethodOptions) -> Tensor:
    """sp(-(beta (r_w - r_l) - gamma)), r = (1 - p^-alpha) / alpha (arXiv 2501.03884)."""
    chosen, rejected = (_alpha_reward(mean, o.alpha) for mean in pairs.means)
    return logistic(o.beta * (chosen - rejected) - o.simpo_gamma, o.label_smoothing)


def dpop(pairs: PairSums, o: MethodOptions) -> Tensor:
    """sp(-beta (h - lambda relu(-W))), Pal et al. 2024 (arXiv 2402.13228)."""
    penalty = o.dpop_lambda * F.relu(-pairs.chosen_ratio)
    return logistic(o.beta * (pairs.gap - penalty), o.label_smoothing)


def r_dpo(pairs: PairSums, o: MethodOptions) -> Tensor:
    """sp(-(beta h + alpha (n_w - n_l))), Park et al. 2024 (arXiv 2403.19159), n in tokens."""
    longer = pairs.chosen_length - pairs.rejected_length
    return logistic(o.beta * pairs.gap + o.alpha * longer, o.label_smoothing)


def apo_zero(pairs: PairSums, o: MethodOptions) -> Tensor:
    """sigma(-beta W) + sigma(beta L), D'Oosterlinck et al. 2024 (arXiv 2408.06266)."""
    chosen = torch.sigmoid(-o.beta * pairs.chosen_ratio)
    return chosen + torch.sigmoid(o.beta * pairs.rejected_ratio)


def apo_down(pairs: PairSums, o: MethodOptions) -> Tensor:
    """sigma(beta W) + sigma(-beta h), likewise."""
    return torch.sigmoid(o.beta * pairs.chosen_ratio) + torch.sigmoid(-o.beta * pairs.gap)


def ratio_rewards(pairs: PairSums, o: MethodOptions) -> tuple[Tensor, Tensor]:
    """beta times each side's ratio to the reference: trl's rewards, (P,) each."""
    chosen, rejected = pairs.chosen_ratio, pairs.rejected_ratio
    if o.length_norm:
        chosen, rejected = chosen / pairs.chosen_length, rejected / pairs.rejected_length
    return o.beta * chosen, o.beta * rejected


def mean_rewards(pairs: PairSums, o: MethodOptions) -> tuple[Tensor, Tensor]:
    """beta times each side's mean log-prob."""
    chosen, rejected = pairs.means
    return o.beta * chosen, o.beta * rejected


def alpha_dpo_rewards(pairs: PairSums, o: MethodOptions) -> tuple[Tensor, Tensor]:
    """beta (m - alpha (m - m_ref)): alpha-DPO's."""
    chosen, rejected = mean_rewards(pairs, o)
    share = o.beta * o.alpha
    return (
        chosen - share * pairs.chosen_ratio / pairs.chosen_length,
        rejected - share * pairs.rejected_ratio / pairs.rejected_length,
    )


def alpha_rewards(pairs: PairSums, o: MethodOptions) -> tuple[Tensor, Tensor]:
    """beta times AlphaPO's reward."""
    chosen, rejected = (_alpha_reward(mean, o.alpha) for mean in pairs.means)
    return o.beta * chosen, o.beta * rejected
