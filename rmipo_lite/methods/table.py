"""The table of methods: every `loss_type` of a run, with what a run must know of it, once.

RMiPO and its nearest (`ops.losses`) are functions of means and one margin, and have kernels. The
others are functions of sums of log-probs, most of them against a reference model, and plain
PyTorch: P numbers a step. `defaults` are the official ones; an option that isn't among them has no
part in the method.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from rmipo_lite.methods import formulas, memory
from rmipo_lite.methods.formulas import MethodOptions
from rmipo_lite.methods.memory import Remembers
from rmipo_lite.methods.sums import PairSums
from rmipo_lite.ops import losses
from rmipo_lite.ops.losses import LOSSES, Loss

Defaults = Mapping[str, Any]

# What stands beside a preference loss that holds nothing by itself: wording, end and length.
_GUARDED = {"sft_weight": 0.5, "end_anchor": 0.1, "length_balance": "auto"}
_BARE = {"sft_weight": 0.0, "end_anchor": 0.0, "length_balance": "off"}
# Of RMiPO and its nearest; what has no part in one of them is passed over there.
_OF_MEANS = {"beta": 2.0, "label_smoothing": 0.0, "simpo_gamma": 0.5, **_GUARDED}


@dataclass(frozen=True)
class SumLoss:
    """A loss of summed log-probs.

    Attributes:
        formula: loss of every pair from the sums and the constants, of one that remembers from the
            step's terms too; autograd gives its gradient.
        words: what it is, for a model card; one line.
        defaults: the constants that it has, as its authors or their code set them.
        rewards: what `rewards/*` are, by its own code.
        needs_reference: whether it measures from the model as it came to the run.
        of_the_step: whether a pair's loss hangs on the others of its optimizer step.
        remembers: what it carries from step to step, if anything.
        needs_logits: whether it looks at the reference's logits, at every step.
        unpaired: whether it takes rows of one completion and a label.
    """

    formula: Callable[..., Tensor]
    words: str
    defaults: Defaults
    rewards: Callable[[PairSums, MethodOptions], tuple[Tensor, Tensor]] = formulas.ratio_rewards
    needs_reference: bool = True
    of_the_step: bool = False
    remembers: Remembers | None = None
    needs_logits: bool = False
    unpaired: bool = False

    needs_prior: bool = field(default=False, init=False)  # as `ops.losses` says it

    @property
    def smoothable(self) -> bool:
        """Whether label smoothing mixes into it."""
        return "label_smoothing" in self.defaults


Method = Loss | SumLoss


def _dpo_like(beta: float = 0.1, label_smoothing: float = 0.0, **constants: float) -> Defaults:
    return {"beta": beta, "label_smoothing": label_smoothing, **constants, **_BARE}


_SUM_LOSSES: dict[str, SumLoss] = {
    "dpo": SumLoss(
        formulas.dpo,
        "DPO ([arXiv:2305.18290](https://arxiv.org/abs/2305.18290)): the log-probabilities' change "
        "from the reference model, chosen over rejected",
        _dpo_like(),
    ),
    "robust": SumLoss(
        formulas.robust,
        "robust DPO ([arXiv:2403.00409](https://arxiv.org/abs/2403.00409)): DPO's loss without the "
        "bias that an assumed share of swapped labels gives it",
        _dpo_like(label_smoothing=0.1),
    ),
    "dpo_norm": SumLoss(
        formulas.dpo_norm, "DPO of log-probabilities per token", _dpo_like(beta=5.0)
    ),
    "ipo": SumLoss(
        formulas.ipo,
        "IPO ([arXiv:2310.12036](https://arxiv.org/abs/2310.12036)): a squared distance to a fixed "
        "gap from the reference model, per token",
        {"beta": 0.1, **_BARE},
    ),
    "kto_pair": SumLoss(
        formulas.kto_pair,
        "KTO's early paired form: each side against the other side's mean change in the step",
        {"beta": 0.1, **_BARE},
        of_the_step=True,
    ),
    "kto": SumLoss(
        formulas.kto,
        "KTO ([arXiv:2402.01306](https://arxiv.org/abs/2402.01306)): labelled completions, each "
        "from the reference model and against the mean change of mismatched ones",
        {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0, **_BARE},
        of_the_step=True,
        unpaired=True,
    ),
    "orpo": SumLoss(
        formulas.orpo,
        "ORPO ([arXiv:2403.07691](https://arxiv.org/abs/2403.07691)): odds of chosen over rejected "
        "beside the chosen side's likelihood, no reference model",
        {"beta": 0.1, **_BARE, "sft_weight": 1.0},
        rewards=formulas.mean_rewards,
        needs_reference=False,
    ),
    "cpo": SumLoss(
        formulas.cpo,
        "CPO ([arXiv:2401.08417](https://arxiv.org/abs/2401.08417)): DPO's loss without a "
        "reference model, beside the chosen side's likelihood",
        {"beta": 0.1, "label_smoothing": 0.0, **_BARE, "sft_weight": 1.0},
        needs_reference=False,
    ),
    "dpo_hinge": SumLoss(
        formulas.dpo_hinge,
        "a hinge loss on DPO's gap ([arXiv:2309.06657](https://arxiv.org/abs/2309.06657))",
        {"beta": 0.1, **_BARE},
    ),
    "slic": SumLoss(
        formulas.slic,
        "SLiC ([arXiv:2305.10425](https://arxiv.org/abs/2305.10425)): a hinge loss on summed "
        "log-probabilities beside the chosen side's likelihood, no reference model",
        {"beta": 1.0, "slic_delta": 1.0, **_BARE, "sft_weight": 0.1},
        needs_reference=False,
    ),
    "alphapo": SumLoss(
        formulas.alphapo,
        "AlphaPO ([arXiv:2501.03884](https://arxiv.org/abs/2501.03884)): SimPO with a reward that "
        "is a power of the probability per token",
        {"beta": 2.5, "label_smoothing": 0.0, "simpo_gamma": 0.1, "alpha": 0.25, **_BARE},
        rewards=formulas.alpha_rewards,
        needs_reference=False,
    ),
    "dpop": SumLoss(
        formulas.dpop,
        "DPO-Positive ([arXiv:2402.13228](https://arxiv.org/abs/2402.13228)): DPO with a penalty "
        "where the chosen side falls below the reference model",
        _dpo_like(dpop_lambda=0.1),
    ),
    "r_dpo": SumLoss(
        formulas.r_dpo,
        "R-DPO ([arXiv:2403.19159](https://arxiv.org/abs/2403.19159)): DPO with the difference of "
        "the lengths beside the gap",
        _dpo_like(alpha=0.05),
    ),
    "apo_zero": SumLoss(
        formulas.apo_zero,
        "APO-zero ([arXiv:2408.06266](https://arxiv.org/abs/2408.06266)): the chosen side up and "
        "the rejected one down, each from the reference model",
        {"beta": 0.1, **_BARE},
    ),
    "apo_down": SumLoss(
        formulas.apo_down,
        "APO-down ([arXiv:2408.06266](https://arxiv.org/abs/2408.06266)): both sides down, the "
        "rejected one more",
        {"beta": 0.1, **_BARE},
    ),
    "alpha_dpo": SumLoss(
        memory.of_means,
        "alpha-DPO ([arXiv:2410.10148](https://arxiv.org/abs/2410.10148)): SimPO with a margin "
        "that grows with the change from the reference model, beside its running mean and spread",
        _dpo_like(beta=10.0, simpo_gamma=4.0, alpha=0.05),
        rewards=formulas.alpha_dpo_rewards,
        of_the_step=True,
        remembers=memory.ALPHA_DPO,
    ),
    "beta_dpo": SumLoss(
        memory.of_gaps,
        "beta-DPO ([arXiv:2407.08639](https://arxiv.org/abs/2407.08639)): DPO with a beta that "
        "follows the step's gaps, on pairs drawn near their running mean",
        {"beta": 0.1, "alpha": 0.6, "beta_dpo_rho": 0.2, **_BARE},
        of_the_step=True,
        remembers=memory.BETA_DPO,
    ),
    "epsilon_dpo": SumLoss(
        memory.of_gaps,
        "epsilon-DPO ([arXiv:2502.13177](https://arxiv.org/abs/2502.13177)): DPO with a beta for "
        "every pair, by what a small step to or from the reference model does to it",
        {"beta": 0.01, "epsilon": 0.01, **_BARE},
        of_the_step=True,
        remembers=memory.EPSILON_DPO,
        needs_logits=True,
    ),
    "gamma_simpo": SumLoss(
        memory.of_means,
        "gamma-SimPO ([arXiv:2506.03690](https://arxiv.org/abs/2506.03690)): SimPO with margins "
        "that a small optimisation over recent gaps finds",
        {"beta": 10.0, "simpo_gamma": 4.0, "gamma_po_tau": 10.0, **_BARE},
        rewards=formulas.mean_rewards,
        needs_reference=False,
        of_the_step=True,
        remembers=memory.GAMMA_SIMPO,
    ),
    "gamma_dpo": SumLoss(
        memory.of_gaps,
        "gamma-DPO ([arXiv:2506.03690](https://arxiv.org/abs/2506.03690)): DPO with margins that a "
        "small optimisation over recent gaps finds",
        {"beta": 10.0, "simpo_gamma": 4.0, "gamma_po_tau": 10.0, "length_norm": True, **_BARE},
        of_the_step=True,
        remembers=memory.GAMMA_DPO,
    ),
}


# Names of other programs that mean the same; `sigmoid` doesn't: trl has it for DPO and for CPO.
_ALIASES = {"sigmoid_norm": "dpo_norm"}
_AMBIGUOUS = {"sigmoid": "dpo (trl's DPOTrainer, LLaMA-Factory) or cpo (trl's CPOTrainer)"}
# Options that a method has or hasn't, by what they must be.
RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    **{
        name: (losses.RANGES[name].strict, losses.RANGES[name].strictly_wanted)
        for name in ("beta", "label_smoothing", "simpo_gamma")
    },
    **dict.fromkeys(
        ("alpha", "dpop_lambda", "slic_delta", "desirable_weight", "undesirable_weight"),
        (lambda x: 0 <= x < math.inf, "a number >= 0"),
    ),
    "beta_dpo_rho": (lambda x: 0 <= x < 1, "in [0, 1)"),
    "gamma_po_tau": (lambda x: 0 < x < math.inf, "a number > 0"),
    "epsilon": (lambda x: 0 < x < 1, "in (0, 1)"),
    "length_norm": (lambda x: isinstance(x, bool), "True or False"),
}


def methods() -> dict[str, Method]:
    """Every method by its name."""
    return {**LOSSES, **_SUM_LOSSES}


def full_name(name: str) -> str:
    """The table's own name of a method; names that mean the same elsewhere are taken.

    Raises:
        ValueError: there is none, or the name means two things.
    """
    if name in _AMBIGUOUS:
        raise ValueError(f"loss_type {name!r} is {_AMBIGUOUS[name]}: name one")
    name = _ALIASES.get(name, name)
    if name not in (known := methods()):
        raise ValueError(f"loss_type must be one of {', '.join(known)}, got {name!r}")
    return name


def method_named(name: str) -> Method:
    """The table's entry; raises as `full_name` does."""
    return methods()[full_name(name)]


def defaults_of(name: str) -> Defaults:
    """What a method's options are where nobody says otherwise."""
    method = method_named(name)
    return method.defaults if isinstance(method, SumLoss) else _OF_MEANS


def methods_with(option: str) -> str:
    """Names of the methods that have an option, for texts."""
    return ", ".join(name for name in methods() if _has(name, option))


def is_option_of(option: str, name: str) -> bool:
    """Whether an option means something to a method; those that aren't a method's do to all."""
    if option in ("gamma_min", "gamma_max"):
        return bool(method_named(name).needs_prior)
    return option not in RANGES or _has(name, option)


def _has(name: str, option: str) -> bool:
    method = method_named(name)
    if isinstance(method, SumLoss):
        return option in method.defaults
    if option == "label_smoothing":
        return method.smoothable
    if option == "simpo_gamma":
        return method.margin == "constant"
    return option in _OF_MEANS and (option != "beta" or method.has_beta)
