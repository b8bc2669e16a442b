"""A step's numbers: per-pair values gathered on the device, reduced once per log line.

Every mean is a mean over pairs, whatever the micro-steps were, so it can be recomputed offline from
the per-pair values. Reading a value waits for the device, so that happens only in `reduce`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rmipo_lite.config import RMiPOConfig
from rmipo_lite.ops import PairLossOutput
from rmipo_lite.ops.losses import Loss
from rmipo_lite.step.losses import reward_scale
from rmipo_lite.tokens.pair import TokenizedPair

# One float32 rounding step around gamma_max: exp(0) is exact, the affine map after it may not be.
_AT_MAX_SLACK = 1e-6
# gamma_min itself is reached at an infinite gap; within this share of the range (a gap of 3 nats)
# gamma counts as standing there.
_NEAR_MIN = 0.05


@dataclass(frozen=True)
class PairValues:
    """What a micro-step says of each of its P pairs. All detached; logps in nats per token."""

    loss: Tensor  # (P,)
    chosen_logps: Tensor  # (P,)
    rejected_logps: Tensor  # (P,)
    gamma: Tensor  # (P,)
    pmi_gap: Tensor  # (P,)
    chosen_pmi: Tensor  # (P,), NaN where the response has no prior
    rejected_pmi: Tensor  # (P,), NaN where the response has no prior
    chosen_length: Tensor  # (P,) scored tokens
    rejected_length: Tensor  # (P,) scored tokens
    chosen_reward: Tensor  # (P,) reward units, as the method's own code logs them
    rejected_reward: Tensor  # (P,)
    label: Tensor  # (P,) of unpaired rows 1 or 0, whose own side that is; NaN of pairs

    @staticmethod
    def of(
        out: PairLossOutput,
        cu_seqlens: Tensor,
        rewards: tuple[Tensor, Tensor],
        labels: Tensor | None = None,
    ) -> PairValues:
        """Read the operator's output, the sequence borders and both sides' rewards, (P,) each."""
        logps = out.logps.detach()
        lengths = cu_seqlens.diff().to(logps.dtype)
        prior = torch.full_like(logps, torch.nan) if out.prior_logps is None else out.prior_logps
        pmi = logps - prior
        return PairValues(
            loss=out.loss.detach(),
            chosen_logps=logps[0::2],
            rejected_logps=logps[1::2],
            gamma=out.gamma,
            pmi_gap=out.pmi_gap,
            chosen_pmi=pmi[0::2],
            rejected_pmi=pmi[1::2],
            chosen_length=lengths[0::2],
            rejected_length=lengths[1::2],
            chosen_reward=rewards[0],
            rejected_reward=rewards[1],
            label=torch.full_like(rewards[0], torch.nan) if labels is None else labels.to(logps),
        )

    @property
    def has_chosen(self) -> Tensor:
        """(P,) whether the chosen side is the row's own."""
        return self.label != 0

    @property
    def has_rejected(self) -> Tensor:
        """(P,) likewise of the rejected one."""
        return self.label != 1


@dataclass
class StepOutcome:
    """What one optimizer step did."""

    loss: Tensor  # () mean over the pairs that counted, detached, sft term included
    values: list[PairValues] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)  # of the pairs in `values`, in their order
    weights: list[float] = field(default_factory=list)  # of the same pairs, length balance
    end_nll: list[Tensor] = field(default_factory=list)  # (P,) each, likewise; empty: no anchor
    num_tokens: int = 0  # tokens read by the policy and the prior pass
    num_pairs: int = 0
    dropped: list[TokenizedPair] = field(default_factory=list)  # not finite, found one by one


def concat(parts: Sequence[PairValues]) -> PairValues:
    """Join the values of several micro-steps or steps."""
    names = PairValues.__dataclass_fields__
    return PairValues(**{n: torch.cat([getattr(part, n) for part in parts]) for n in names})


def restored(part: Mapping[str, Tensor], args: RMiPOConfig, device: torch.device) -> PairValues:
    """Values as a checkpoint keeps them; an older one has no rewards, which were of means then.

    Nor has it labels: there were pairs alone.
    """
    kept = {name: value.to(device) for name, value in part.items()}
    loss = args.loss  # another one than the checkpoint's, perhaps
    scale = reward_scale(loss, args) if isinstance(loss, Loss) else args.beta
    for side in ("chosen", "rejected"):
        kept.setdefault(f"{side}_reward", scale * kept[f"{side}_logps"])
    kept.setdefault("label", torch.full_like(kept["loss"], torch.nan))
    return PairValues(**kept)


def finite_pairs(values: PairValues) -> Tensor:
    """(P,) bool: pairs whose loss and log-probs are numbers. A PMI may be undefined."""
    numbers = torch.stack([values.loss, values.chosen_logps, values.rejected_logps])
    return numbers.isfinite().all(0)


def select(values: PairValues, mask: Tensor) -> PairValues:
    """The pairs where the mask (P,) is true."""
    names = PairValues.__dataclass_fields__
    return PairValues(**{n: getattr(values, n)[mask] for n in names})


def reduce(parts: Sequence[PairValues], args: RMiPOConfig) -> dict[str, float]:
    """Means over all pairs of the parts, under trl's names where trl has one.

    Of unpaired rows those of a label are over the rows that have it, and absent where none has.
    """
    if not parts:
        return {}
    values = concat(parts)
    if args.loss.unpaired:
        return _of_rows(values, args)
    each = _of_pairs(values)
    dtype = values.loss.dtype
    named = {
        "rewards/chosen": values.chosen_reward.mean(),
        "rewards/rejected": values.rejected_reward.mean(),
        **{name: column.mean() for name, column in each.items()},
        "lengths/chosen": values.chosen_length.mean(),
        "lengths/rejected": values.rejected_length.mean(),
    }
    if args.uses_prior:
        undefined = values.chosen_pmi.isnan() | values.rejected_pmi.isnan()
        at_max = values.gamma >= args.gamma_max - _AT_MAX_SLACK
        near_min = args.gamma_min + _NEAR_MIN * (args.gamma_max - args.gamma_min)
        at_min = values.gamma <= near_min
        named |= {
            "rmipo/gamma": values.gamma.mean(),
            "rmipo/gamma_std": values.gamma.std(correction=0),
            "rmipo/gamma_at_max": at_max.to(dtype).mean(),
            "rmipo/gamma_at_min": at_min.to(dtype).mean(),
            "rmipo/pmi_gap": values.pmi_gap.mean(),
            "rmipo/pmi_gap_std": values.pmi_gap.std(correction=0),
            "rmipo/pmi_chosen": _mean_of_defined(values.chosen_pmi),
            "rmipo/pmi_rejected": _mean_of_defined(values.rejected_pmi),
            "rmipo/pmi_undefined": undefined.to(dtype).mean(),
        }
    return _told(named)


def _told(named: Mapping[str, Tensor]) -> dict[str, float]:
    # One transfer for all of them.
    numbers = torch.stack([value.float() for value in named.values()]).tolist()
    return dict(zip(named, numbers, strict=True))


def _of_rows(values: PairValues, args: RMiPOConfig) -> dict[str, float]:
    """The means of unpaired rows, with `kl`, of which trl's is clamped step by step."""
    each = _sides_of_rows(values)
    numbers = _told(
        {
            "rewards/accuracies": _right_of_rows(values).mean(),
            **{name: column.nanmean() for name, column in each.items()},
            "kl": _mismatched(values).mean().clamp(min=0) / args.beta,
        }
    )
    if not any(math.isnan(numbers[f"rewards/{side}"]) for side in ("chosen", "rejected")):
        numbers["rewards/margins"] = numbers["rewards/chosen"] - numbers["rewards/rejected"]
    return {name: number for name, number in numbers.items() if not math.isnan(number)}


def _sides_of_rows(values: PairValues) -> dict[str, Tensor]:
    """(P,) each, NaN where the side isn't the row's own."""
    owned = {"chosen": values.has_chosen, "rejected": values.has_rejected}
    return {
        f"{name}/{side}": getattr(values, f"{side}_{column}").where(own, torch.nan)
        for name, column in (("rewards", "reward"), ("logps", "logps"), ("lengths", "length"))
        for side, own in owned.items()
    }


def _right_of_rows(values: PairValues) -> Tensor:
    """(P,) whether a row's own completion went where its label says: up or down."""
    own = torch.where(values.has_chosen, values.chosen_reward, -values.rejected_reward)
    return (own > 0).to(own.dtype)


def _mismatched(values: PairValues) -> Tensor:
    """(P,) the reward of the other side."""
    return torch.where(values.has_chosen, values.rejected_reward, values.chosen_reward)


def cases(values: PairValues, args: RMiPOConfig) -> dict[str, list[float]]:
    """Each pair's own part of the means that tell how a run went, by their names.

    Of an unpaired row NaN where it has no part in a mean, and of a PMI gap that isn't defined.
    """
    parts = _of_pairs(values)
    parts |= {"lengths/chosen": values.chosen_length, "lengths/rejected": values.rejected_length}
    if args.uses_prior:
        undefined = values.chosen_pmi.isnan() | values.rejected_pmi.isnan()
        parts["rmipo/gamma"] = values.gamma
        parts["rmipo/pmi_gap"] = values.pmi_gap.masked_fill(undefined, torch.nan)
    if not values.label.isnan().any():
        parts = {"rewards/accuracies": _right_of_rows(values), **_sides_of_rows(values)}
    named = {"loss": values.loss, **parts}
    # One transfer for all of them.
    columns = torch.stack([value.float() for value in named.values()]).tolist()
    return dict(zip(named, columns, strict=True))


def _of_pairs(values: PairValues) -> dict[str, Tensor]:
    """(P,) each: what accuracy, margin and log-probs are the means of."""
    margin = values.chosen_reward - values.rejected_reward
    return {
        "rewards/accuracies": (margin > 0).to(margin.dtype),
        "rewards/margins": margin,
        "logps/chosen": values.chosen_logps,
        "logps/rejected": values.rejected_logps,
    }


def _mean_of_defined(pmi: Tensor) -> Tensor:
    # 0 where no response of the window has a prior; rmipo/pmi_undefined is then 1.
    return torch.nan_to_num(torch.nanmean(pmi), nan=0.0)
