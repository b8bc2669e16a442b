"""Every method against numbers recorded from its own public code: losses and gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from rmipo_lite.methods.formulas import MethodOptions
from rmipo_lite.methods.sums import PairSums, pair_sums, sequence_sums
from rmipo_lite.methods.table import SumLoss, defaults_of, method_named
from rmipo_lite.ops.losses import PairOptions
from tests.methods.golden import Opts, close, golden, needs_golden, numbers, recorded, sums


def _plain(row: Opts) -> Opts:
    """Their constants by our names, where these are the method's own."""
    renamed = {
        "tau": "beta", "ls": "label_smoothing", "epsilon": "label_smoothing", "lam": "dpop_lambda",
        "dpo_positive_lambda": "dpop_lambda", "len_reg_alpha": "alpha", "delta": "slic_delta",
        "gamma": "simpo_gamma",
    }  # fmt: skip
    known = {"beta", "label_smoothing", "alpha", "simpo_gamma", "dpop_lambda", "slic_delta"}
    named = {renamed.get(name, name): value for name, value in row["opts"].items()}
    return {name: value for name, value in named.items() if name in known}


def _ratio(row: Opts) -> Opts:
    """SimPO's margin as a share of beta; trl's and LLaMA-Factory's stands beside it."""
    opts = row["opts"]
    share = opts["gamma"] if row["src"] == "turbo" else opts.get("gamma_beta_ratio")
    gamma = opts.get("gamma", 0.5) if share is None else share * opts["beta"]
    return {**_plain(row), "simpo_gamma": gamma}


def _odds(row: Opts) -> Opts:
    return {"beta": row["opts"]["gamma_beta_ratio"]}


# (our method, their label, which form of it or any, their constants by our names)
SAME: list[tuple[str, str, str | None, Callable[[Opts], Opts]]] = [
    ("dpo", "dpo", None, _plain),
    ("dpo", "cdpo", None, _plain),
    ("dpo", "lf_silently_sigmoid", "sum", _plain),
    ("robust", "robust", None, _plain),
    ("dpo_norm", "dpo_norm", None, _plain),
    ("dpo_norm", "sigmoid_norm", None, _plain),
    ("ipo", "ipo", None, _plain),
    ("kto_pair", "kto_pair", None, _plain),
    ("orpo", "orpo", None, _plain),
    ("orpo", "orpo_lf", None, _plain),
    ("orpo", "orpo_gammapo", None, _odds),
    ("cpo", "cpo", None, _plain),
    ("cpo", "dpo_reference_free", None, _plain),
    ("dpo_hinge", "hinge", None, _plain),
    ("slic", "slic_turbo", None, _plain),
    ("alphapo", "alphapo", None, _plain),
    ("dpop", "dpop", None, _plain),
    ("r_dpo", "r_dpo", "sum", _plain),
    ("apo_zero", "apo_zero", None, _plain),
    ("apo_down", "apo_down", None, _plain),
    ("simpo", "simpo", "mean", _ratio),
    ("simper", "simper", None, _plain),
    ("hinge", "simpo_hinge", None, _ratio),
]
# How much of the chosen side's likelihood their number holds: a mean over all tokens, or of rows.
_OF_TOKENS = {"orpo": 1.0}
_OF_ROWS = {"orpo_lf": 1.0, "orpo_gammapo": 1.0}


def _rows(theirs: str, fed: str | None) -> Iterator[tuple[Opts, Any, Opts]]:
    """(row, case, what is right) of a label, without what isn't the method."""
    rows, cases, exact = golden()
    for row in rows:
        if row["method"] != theirs or "error" in row or fed not in (None, row["fed"]):
            continue
        case = cases[row["case"]]
        if row["fed"] == "tokens" and theirs == "ipo" and not _all_differ(case):
            continue  # divides by the tokens that differ from the reference
        if row["opts"].get("norm") and theirs == "slic_turbo":
            continue  # against a reference
        right = exact.get(row["id"])
        yield row, case, row if right is None else {
            "loss": right["exact_loss"], "gw": right["exact_gw"], "gl": right["exact_gl"]
        }  # fmt: skip


def _all_differ(case: Opts) -> bool:
    return all(
        a != b
        for side in "wl"
        for ours, reference in zip(case[f"tok_{side}"], case[f"rtok_{side}"], strict=True)
        for a, b in zip(ours, reference, strict=True)
    )


def _losses(name: str, pairs: PairSums, options: Opts) -> Tensor:
    method, constants = method_named(name), {**defaults_of(name), **options}
    if isinstance(method, SumLoss):
        own = (float(constants.get(option) or 0.0) for option in MethodOptions._fields)
        return method.formula(pairs, MethodOptions(*own))
    return _OfMeans.apply(*pairs.means, name, constants)


class _OfMeans(torch.autograd.Function):
    """A loss of `ops.losses`, whose formula gives its own derivatives."""

    @staticmethod
    def forward(ctx: Any, chosen: Tensor, rejected: Tensor, name: str, constants: Opts) -> Tensor:
        options = PairOptions(
            name, constants["beta"], 0.3, 1.6, False, constants["label_smoothing"], 0.0
        )
        gamma = torch.full_like(chosen, constants["simpo_gamma"])
        loss, *slopes = method_named(name).formula(chosen, rejected, gamma, options)  # type: ignore[call-arg,arg-type]
        ctx.save_for_backward(*slopes)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        chosen, rejected = ctx.saved_tensors
        return grad * chosen, grad * rejected, None, None


def _likelihood(row: Opts, pairs: PairSums) -> Tensor | float:
    theirs = row["method"]
    weight = row["opts"].get("cpo_alpha", 1.0) if theirs == "cpo" else _OF_TOKENS.get(theirs, 0.0)
    of_tokens = -pairs.chosen.sum() / pairs.chosen_length.sum()
    return weight * of_tokens - _OF_ROWS.get(theirs, 0.0) * pairs.means[0].mean()


@needs_golden
@pytest.mark.parametrize("label", ["kto", "kto_halos"])
def test_recorded_numbers_of_unpaired_rows(label: str) -> None:
    found = recorded()
    cases = {case["id"]: case for case in found["unpaired_cases"]}
    rows = [row for row in found["rows"] if row["method"] == label]
    count = 0
    for row in rows:
        case = cases[row["case"]]
        changes = numbers(case["KL_S"]) - numbers(case["KL_R"])
        if label == "kto_halos" and (changes == 0).any():
            continue  # divides by the changes that aren't 0
        labels = numbers(case["label"])
        wanted = labels.bool()
        leaf = numbers(case["S"]).requires_grad_()
        own, other = (leaf, numbers(case["R"])), (numbers(case["KL_S"]), numbers(case["KL_R"]))
        sides = [
            (torch.where(wanted, a, b), torch.where(wanted, b, a))
            for a, b in zip(own, other, strict=True)
        ]
        lengths = torch.ones(len(labels), dtype=torch.float64)
        pairs = PairSums(*sides[0], lengths, lengths, *sides[1], labels=labels)
        options = {**defaults_of("kto"), **row["opts"]}
        method = method_named("kto")
        assert isinstance(method, SumLoss)
        names = MethodOptions._fields
        constants = MethodOptions(*(float(options.get(n) or 0.0) for n in names))
        loss = method.formula(pairs, constants).mean()
        loss.backward()
        assert close(loss.detach()[None], numbers([row["loss"]]), 1e-10, 1.0), row["id"]
        assert leaf.grad is not None
        assert close(leaf.grad, numbers(row["g"]), 1e-10, 1e-3), row["id"]
        count += 1
    assert count >= 16


@needs_golden
@pytest.mark.parametrize(
    ("ours", "theirs", "fed", "translate"),
    SAME,
    ids=[f"{ours}-{theirs}" for ours, theirs, *_ in SAME],
)
def test_recorded_numbers(
    ours: str, theirs: str, fed: str | None, translate: Callable[[Opts], Opts]
) -> None:
    count, wrong = 0, []
    for row, case, right in _rows(theirs, fed):
        if row["fed"] == "tokens":
            continue
        pairs, leaf = sums(case, row["dtype"])
        loss = _losses(ours, pairs, translate(row)).mean() + _likelihood(row, pairs)
        loss.backward()
        assert leaf.grad is not None
        if not loss.isfinite():  # AlphaPO's e^760, past float64
            assert (ours, case["id"]) == ("alphapo", "e07")
            continue
        assert leaf.grad.isfinite().all(), row["id"]
        exact = row["dtype"] == "float64"
        tolerance, floor = (1e-10, 1e-3) if exact else (1e-6, 1.0)
        sound = (
            close(loss.detach()[None], numbers([right["loss"]]), tolerance, 1.0)
            and close(leaf.grad[0::2], numbers(right["gw"]), tolerance, floor)
            and close(leaf.grad[1::2], numbers(right["gl"]), tolerance, floor)
        )
        count += 1
        if not sound:
            wrong.append((row["id"], row["src"], case["id"], row["opts"], loss.item(), right))
    assert count > 20 or theirs == "lf_silently_sigmoid"
    assert not wrong, wrong[:3]


@needs_golden
@pytest.mark.parametrize(
    ("theirs", "ours"), [("dpo", "dpo"), ("cdpo", "dpo"), ("ipo", "ipo"), ("ld_dpo", None)]
)
def test_recorded_numbers_of_tokens(theirs: str, ours: str | None) -> None:
    """The sums too: over all tokens, and with `ld_alpha` over the longer side's tail by less."""
    trl = {"sigmoid": "dpo", "sigmoid_norm": "dpo_norm", "ipo": "ipo"}
    count = 0
    for row, case, right in _rows(theirs, "tokens"):
        name = ours or trl[row["opts"]["loss_types"][0]]
        lengths = [n for both in zip(case["n_w"], case["n_l"], strict=True) for n in both]
        borders = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        policy, reference = (
            torch.tensor([x for both in zip(case[w], case[r], strict=True) for side in both
                          for x in side], dtype=torch.float64)
            for w, r in (("tok_w", "tok_l"), ("rtok_w", "rtok_l"))
        )  # fmt: skip
        policy.requires_grad_()
        sums = (sequence_sums(t, borders, row["opts"].get("ld_alpha")) for t in (policy, reference))
        loss = _losses(name, pair_sums(next(sums), borders, next(sums)), _plain(row)).mean()
        loss.backward()
        assert policy.grad is not None
        grads = [part.tolist() for part in policy.grad.split(lengths)]
        assert loss.item() == pytest.approx(right["loss"], rel=1e-10, abs=1e-10)
        for ours_of, theirs_of in ((grads[0::2], row["gtok_w"]), (grads[1::2], row["gtok_l"])):
            for a, b in zip(ours_of, theirs_of, strict=True):
                assert a == pytest.approx(b, rel=1e-9, abs=1e-13)
        count += 1
    assert count >= 6
