"""The table of losses: every fact about a loss, once.

A loss is a function f(chosen mean, rejected mean, one detached margin per pair) of mean log-probs
in nats per token. Config, kernels, metrics, findings, model card and inspection all read what they
need of it here, so a new loss is one more entry, and one more case in `csrc/pair_math.h` if it is
to have a kernel. A name that isn't here is an error everywhere.

The formulas are computed in float64 whatever comes in: P numbers cost nothing, and float32 would
add its rounding to a margin that lies in 0.3 to 1.6. Where the device has no float64 they are
computed on the CPU.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class PairOptions(NamedTuple):
    """The constants of a pair loss; formulas in `rmipo_lite.ops.loss`."""

    loss_type: str
    beta: float
    gamma_min: float
    gamma_max: float
    gamma_scaled_by_beta: bool
    label_smoothing: float
    simpo_gamma: float


LossAndGrads = tuple[Tensor, Tensor, Tensor]


def _logistic(z: Tensor, beta: float, label_smoothing: float) -> LossAndGrads:
    """-(1-e) logsigmoid(z) - e logsigmoid(-z), with d z / d chosen = beta = -d z / d rejected."""
    loss = (1 - label_smoothing) * F.softplus(-z, threshold=40.0)
    slope = -(1 - label_smoothing) * torch.sigmoid(-z)
    if label_smoothing:  # not added where it is off: 0 * inf would be NaN
        loss = loss + label_smoothing * F.softplus(z, threshold=40.0)
        slope = slope + label_smoothing * torch.sigmoid(z)
    return loss, beta * slope, -beta * slope


def _rmipo(chosen: Tensor, rejected: Tensor, gamma: Tensor, options: PairOptions) -> LossAndGrads:
    if options.gamma_scaled_by_beta:
        z = options.beta * (chosen - rejected - gamma)
    else:
        z = options.beta * (chosen - rejected) - gamma
    return _logistic(z, options.beta, options.label_smoothing)


def _simpo(chosen: Tensor, rejected: Tensor, gamma: Tensor, options: PairOptions) -> LossAndGrads:
    z = options.beta * (chosen - rejected) - gamma
    return _logistic(z, options.beta, options.label_smoothing)


def _hinge(chosen: Tensor, rejected: Tensor, gamma: Tensor, options: PairOptions) -> LossAndGrads:
    short = 1 - (options.beta * (chosen - rejected) - gamma)
    slope = -options.beta * (short > 0).to(short.dtype)
    slope = torch.where(short.isnan(), short, slope)
    return F.relu(short), slope, -slope


def _simper(chosen: Tensor, rejected: Tensor, gamma: Tensor, options: PairOptions) -> LossAndGrads:
    inverse_perplexity = chosen.exp(), rejected.exp()
    loss = inverse_perplexity[1] - inverse_perplexity[0]
    return loss, -inverse_perplexity[0], inverse_perplexity[1]


Margin = Literal["pmi", "constant", "none"]


@dataclass(frozen=True)
class Loss:
    """What there is to know about a loss.

    Attributes:
        formula: loss and derivatives from the two means and the margin.
        words: what it is, for a model card; one line.
        margin: where the pair's margin comes from: "pmi" is `adaptive_gamma` of the PMI gap and
            needs the prior pass, "constant" is `simpo_gamma`, "none" is 0.
        has_beta: whether its derivatives carry the factor beta.
        beta_in_rewards: whether `rewards/*` are beta * logps, as in the authors' metrics, or logps.
        smoothable: whether it has the two-sided logistic form that label smoothing mixes.
        kernel: its number in csrc/pair_math.h; None where plain PyTorch does the work.
    """

    formula: Callable[[Tensor, Tensor, Tensor, PairOptions], LossAndGrads]
    words: str
    margin: Margin
    has_beta: bool
    beta_in_rewards: bool
    smoothable: bool
    kernel: int | None

    # As an entry of `methods.table` says it.
    needs_reference: bool = field(default=False, init=False)
    of_the_step: bool = field(default=False, init=False)
    unpaired: bool = field(default=False, init=False)
    needs_logits: bool = field(default=False, init=False)
    remembers: None = field(default=None, init=False)

    @property
    def needs_prior(self) -> bool:
        """Whether responses are scored without their prompt too."""
        return self.margin == "pmi"


LOSSES: dict[str, Loss] = {
    "rmipo": Loss(
        _rmipo,
        "RMiPO ([arXiv:2604.24804](https://arxiv.org/abs/2604.24804)): SimPO's loss with a target "
        "margin that every pair sets for itself from the mutual information of prompt and response",
        margin="pmi", has_beta=True, beta_in_rewards=True, smoothable=True, kernel=0,
    ),
    "simpo": Loss(
        _simpo,
        "SimPO ([arXiv:2405.14734](https://arxiv.org/abs/2405.14734)): length-normalised "
        "log-probabilities and one constant target margin",
        margin="constant", has_beta=True, beta_in_rewards=True, smoothable=True, kernel=1,
    ),
    "hinge": Loss(
        _hinge,
        "a hinge loss on length-normalised log-probabilities",
        margin="constant", has_beta=True, beta_in_rewards=False, smoothable=False, kernel=2,
    ),
    "simper": Loss(
        _simper,
        "SimPER: inverse perplexities, no reference model and no margin",
        margin="none", has_beta=False, beta_in_rewards=False, smoothable=False, kernel=3,
    ),
}  # fmt: skip


def loss_named(name: str) -> Loss:
    """The table's entry.

    Raises:
        ValueError: there is none; the message names those there are.
    """
    if name not in LOSSES:
        raise ValueError(f"loss_type must be one of {', '.join(LOSSES)}, got {name!r}")
    return LOSSES[name]


def losses_with(**facts: object) -> str:
    """Names of the losses that these facts hold for, for texts: `losses_with(smoothable=True)`."""
    wanted = facts.items()
    return ", ".join(
        name for name, loss in LOSSES.items() if all(getattr(loss, k) == v for k, v in wanted)
    )


class Range(NamedTuple):
    """What an option may be. A run is asked for more than the formula: `strict` is for runs.

    The formula is defined, and recorded from the authors' code, where a run makes no sense: with
    beta 0 nothing is learnt, with half of the labels taken for swapped the other side is.
    """

    holds: Callable[[float], bool]  # where the formula is defined
    wanted: str
    strict: Callable[[float], bool]
    strictly_wanted: str


RANGES: dict[str, Range] = {
    "beta": Range(
        lambda x: 0 <= x < math.inf, "finite and at least 0",
        lambda x: 0 < x < math.inf, "a number > 0",
    ),
    "gamma_min": Range(math.isfinite, "finite", lambda x: 0 <= x < math.inf, "a number >= 0"),
    "gamma_max": Range(math.isfinite, "finite", lambda x: 0 <= x < math.inf, "a number >= 0"),
    "simpo_gamma": Range(math.isfinite, "finite", lambda x: 0 <= x < math.inf, "a number >= 0"),
    "label_smoothing": Range(
        lambda x: 0 <= x <= 1, "between 0 and 1", lambda x: 0 <= x < 0.5, "in [0, 0.5)"
    ),
}  # fmt: skip


def option_problem(options: PairOptions, *, strict: bool) -> str | None:
    """What is wrong with the options, as `beta must be ..., got ...`; None where nothing is.

    Args:
        options: the constants of a loss.
        strict: whether they are a run's.
    """
    loss = loss_named(options.loss_type)
    for name, allowed in RANGES.items():
        value = getattr(options, name)
        if not (allowed.strict if strict else allowed.holds)(value):
            wanted = allowed.strictly_wanted if strict else allowed.wanted
            return f"{name} must be {wanted}, got {value!r}"
    if options.gamma_min > options.gamma_max:
        return f"gamma_min must be at most gamma_max = {options.gamma_max}, got {options.gamma_min}"
    if options.label_smoothing and not loss.smoothable:
        return (
            f"label_smoothing must be 0 for loss_type={options.loss_type!r} (only "
            f"{losses_with(smoothable=True)} have it), got {options.label_smoothing!r}"
        )
    return None


def adaptive_gamma(pmi_gap: Tensor, gamma_min: float, gamma_max: float) -> Tensor:
    """gamma_min + (gamma_max - gamma_min) * exp(-max(0, pmi_gap)), in [gamma_min, gamma_max].

    The clamp stands before exp, so no gap overflows; NaN stays NaN, so that it is seen.
    """
    gamma = gamma_min + (gamma_max - gamma_min) * torch.exp(-pmi_gap.clamp(min=0.0))
    return gamma.clamp(gamma_min, gamma_max)


def margins(pmi_gap: Tensor, options: PairOptions) -> Tensor:
    """The margin of every pair, (P,), by its loss."""
    loss = loss_named(options.loss_type)
    if loss.margin == "pmi":
        return adaptive_gamma(pmi_gap, options.gamma_min, options.gamma_max)
    constant = options.simpo_gamma if loss.margin == "constant" else 0.0
    return torch.full_like(pmi_gap, constant)
