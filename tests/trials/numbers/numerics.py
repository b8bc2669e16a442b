"""Values and gradients of the operators against float64, on shapes nobody would choose.

The reference is float64 of the same rounded inputs. Sums are float32 inside, so fp32 and 16-bit
inputs leave log-probs within 1e-5 and 2e-5 of it, and float64 inputs within 1e-12 of their size. A
gradient is a sum of terms that may cancel, so it is held to the size of its terms.
"""

from __future__ import annotations

import random
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from rmipo_lite.ops import pair_loss, rmipo_loss
from rmipo_lite.ops.reference import IGNORED
from tests.trials.numbers.operands import (
    HeadCase,
    any_impl,
    ragged_borders,
    random_head,
    seeded,
)
from tests.trials.numbers.truth import Formula, PairTruth, head_truth, mean, pair_truth
from tests.trials.scorecard import Check, Trial, Trials, expect, threads

# Absolute error of a log-prob, nats.
_LOGPS = {torch.float32: 1e-5, torch.bfloat16: 2e-5, torch.float16: 2e-5}
# Error of a gradient, of the size of the terms it sums: float32 sums, and one rounding to the
# dtype it is returned in. bfloat16 products round the probabilities and a block's sum as well.
_GRADS = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
_DOUBLE = 1e-12
_FORMULAS = ("rmipo", "simpo", "hinge", "simper")


def against_float64(trials: Trials) -> None:
    """Check 4: `linear_logps`, `pair_loss` and `rmipo_loss` in turn, everything else at random."""
    kinds = (_head, _pairs, _means)
    for trial in trials:
        with trial, threads(1 + trial.index % 2):
            kinds[trial.index % 3](trial)


def _head(trial: Trial) -> None:
    rng = trial.rng
    case = random_head(rng)
    trial.tried = str(case)
    upstream = torch.randn(len(case.hidden), generator=seeded(rng))
    leaves = case.leaves()
    logps = case.logps(*leaves)
    expect(logps.dtype == torch.promote_types(case.hidden.dtype, torch.float32), "dtype of logps")
    truth = head_truth(case, upstream)
    dtype = case.hidden.dtype
    tolerance = unit = _DOUBLE * (1 + truth.largest_logit)
    if dtype != torch.float64:
        # What a float32 product loses: of the target and of the sum, and of every probability.
        product = 2**-22 * truth.largest_terms
        tolerance, unit = _LOGPS[dtype] + product, _GRADS[dtype] + product
    error = _worst(logps.detach(), truth.logps)
    expect(error <= tolerance, f"logps off by {error:.2e}, allowed {tolerance:.1e}")
    expect(logps[case.target_ids == IGNORED].eq(0).all(), "an ignored row has a log-prob")
    own = _torch_error(case, truth.logps)
    if own is not None:
        expect(error <= 2 * own + 1e-6, f"logps off by {error:.2e}, torch's own by {own:.2e}")
    if case.mode == "value":
        return
    logps.backward(upstream.to(logps.dtype))
    named = {"hidden": (leaves[0].grad, truth.hidden, truth.hidden_terms)}
    if case.mode == "recompute":
        named["weight"] = (leaves[1].grad, truth.weight, truth.weight_terms)
        if leaves[2] is not None:
            named["bias"] = (leaves[2].grad, truth.bias, truth.bias_terms)
    for name, (got, want, terms) in named.items():
        expect(got is not None, f"{name} has no gradient")
        assert got is not None
        _expect_gradient(name, got, want, unit * terms)
    assert leaves[0].grad is not None
    ignored = leaves[0].grad[case.target_ids == IGNORED]
    expect(ignored.eq(0).all(), "an ignored row has a gradient")


def _expect_gradient(name: str, got: Tensor, want: Tensor, allowed: Tensor) -> None:
    # Below the smallest normal number a rounding is absolute.
    limits = torch.finfo(got.dtype)
    excess = (got.double() - want).abs() - allowed - limits.smallest_normal * limits.eps
    worst = float(excess.max()) if excess.numel() else 0.0
    expect(worst <= 0, f"gradient of {name} off by {worst:.2e} more than rounding explains")


def _torch_error(case: HeadCase, truth: Tensor) -> float | None:
    """Error of cross_entropy in the same dtype; None where our logits are rounded as its are."""
    if case.rounds_logits or not case.hidden.numel():
        return None
    logits = case.hidden @ case.weight.T
    logits = logits if case.bias is None else logits + case.bias
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * case.logit_scale
    if case.logit_softcap is not None:
        logits = case.logit_softcap * torch.tanh(logits / case.logit_softcap)
    return _worst(-F.cross_entropy(logits, case.target_ids, reduction="none"), truth)


def _worst(a: Tensor, b: Tensor) -> float:
    difference = (a.double() - b).abs()
    return float(difference.max()) if difference.numel() else 0.0


def random_formula(rng: random.Random) -> Formula:
    """A loss with its constants."""
    loss_type = rng.choice(_FORMULAS)
    smoothed = loss_type in ("rmipo", "simpo")
    low = rng.choice((0.0, 0.3, 1.0))
    return Formula(
        loss_type=loss_type,
        beta=rng.choice((0.1, 1.0, 2.0, 10.0)),
        gamma_min=low,
        gamma_max=low + rng.choice((0.0, 1.3)),
        gamma_scaled_by_beta=rng.random() < 0.5,
        label_smoothing=rng.choice((0.0, 0.1)) if smoothed else 0.0,
        simpo_gamma=rng.choice((0.0, 0.5, 3.0)),
    )


def _pairs(trial: Trial) -> None:
    rng = trial.rng
    formula, pairs = random_formula(rng), rng.choice((0, 1, 2, 7, 40))
    dtype = rng.choice((torch.float32, torch.float64))
    generator = seeded(rng)
    impl = any_impl(rng)
    has_prior = formula.loss_type == "rmipo" or rng.random() < 0.5
    trial.tried = f"pairs {impl} {formula.loss_type}, P={pairs} {dtype}, {formula}"
    borders = ragged_borders(rng, 2 * pairs, may_be_empty=False)
    prior_borders = ragged_borders(rng, 2 * pairs, may_be_empty=True)
    token_logps = _token_logps(int(borders[-1]), dtype, generator)
    prior = _token_logps(int(prior_borders[-1]), dtype, generator)
    leaf = token_logps.detach().requires_grad_()
    out = pair_loss(
        leaf,
        _strided(borders, rng),
        _strided(prior, rng) if has_prior else None,
        _strided(prior_borders, rng) if has_prior else None,
        impl=impl,
        **vars(formula),
    )
    upstream = torch.randn(pairs, generator=generator, dtype=torch.float64)
    out.loss.backward(upstream.to(dtype))
    means = _means_of(token_logps, borders)
    priors = _means_of(prior, prior_borders) if has_prior else [float("nan")] * (2 * pairs)
    truths = [
        pair_truth((means[2 * p], means[2 * p + 1]), (priors[2 * p], priors[2 * p + 1]), formula)
        for p in range(pairs)
    ]
    _expect_values("logps", out.logps, means)
    if has_prior:
        assert out.prior_logps is not None
        _expect_values("prior_logps", out.prior_logps, priors)
    _expect_pairs(truths, out.loss, out.gamma, out.pmi_gap)
    slopes = [g for t in truths for g in (t.grad_chosen, t.grad_rejected)]
    want = [
        float(upstream[s // 2]) * slopes[s] / (end - start)
        for s, (start, end) in enumerate(pairwise(borders.tolist()))
        for _ in range(end - start)
    ]
    assert leaf.grad is not None
    _expect_values("the gradient", leaf.grad, want)


def _means(trial: Trial) -> None:
    rng = trial.rng
    formula, pairs = random_formula(rng), rng.choice((0, 1, 3, 50))
    generator = seeded(rng)
    impl = any_impl(rng)
    # The sides needn't share a dtype.
    dtypes = [rng.choice((torch.float32, torch.bfloat16, torch.float16, torch.float64))] * 4
    if rng.random() < 0.3:
        dtypes[rng.randrange(4)] = torch.float32
    trial.tried = f"means {impl}, P={pairs} {dtypes}, {formula}"
    logps = [
        _strided(_token_logps(pairs, dtype, generator), rng).detach().requires_grad_()
        for dtype in dtypes
    ]
    formula = Formula(**{**vars(formula), "loss_type": "rmipo"})
    constants = {k: v for k, v in vars(formula).items() if k not in ("loss_type", "simpo_gamma")}
    out = rmipo_loss(*logps, impl=impl, **constants)
    wide = torch.float64 in dtypes
    expect(out.loss.dtype == (torch.float64 if wide else torch.float32), "dtype of the loss")
    upstream = torch.randn(pairs, generator=generator, dtype=torch.float64)
    out.loss.backward(upstream.to(out.loss.dtype))
    sides = [side.detach().double().tolist() for side in logps]
    truths = [
        pair_truth((sides[0][p], sides[1][p]), (sides[2][p], sides[3][p]), formula)
        for p in range(pairs)
    ]
    _expect_pairs(truths, out.loss, out.gamma, out.pmi_gap)
    slopes = [[t.grad_chosen for t in truths], [t.grad_rejected for t in truths]]
    for side, want in zip(logps[:2], slopes, strict=True):
        assert side.grad is not None
        _expect_values(
            "the gradient", side.grad, [float(u) * w for u, w in zip(upstream, want, strict=True)]
        )
    expect(all(side.grad is None for side in logps[2:]), "a prior has a gradient")


def _expect_pairs(truths: list[PairTruth], loss: Tensor, gamma: Tensor, gap: Tensor) -> None:
    _expect_values("the loss", loss, [t.loss for t in truths])
    _expect_values("gamma", gamma, [t.gamma for t in truths])
    _expect_values("the gap", gap, [t.pmi_gap for t in truths])


def _expect_values(name: str, got: Tensor, want: list[float]) -> None:
    """Within one rounding of the dtype (float64: 1e-12), NaN where NaN is wanted."""
    unit = _DOUBLE if got.dtype == torch.float64 else torch.finfo(got.dtype).eps
    truth = torch.tensor(want, dtype=torch.float64)
    expect(got.shape == truth.shape, f"{name} has shape {tuple(got.shape)}")
    expect(torch.equal(got.isnan(), truth.isnan()), f"{name} is NaN in other places")
    error = ((got.double() - truth).abs() - unit * (truth.abs() + 1)).nan_to_num()
    worst = float(error.max()) if error.numel() else 0.0
    expect(worst <= 0, f"{name} off by {worst:.2e} more than {unit:.1e}")


def _token_logps(count: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return -torch.rand(count, generator=generator, dtype=torch.float64).mul(12).to(dtype)


def _strided(values: Tensor, rng: random.Random) -> Tensor:
    """The same values, one time in two with a stride of 2."""
    if rng.random() < 0.5 or not len(values):
        return values
    wide = values.new_zeros(2 * len(values))
    wide[::2] = values
    return wide[::2]


def _means_of(token_logps: Tensor, borders: Tensor) -> list[float]:
    values = token_logps.double().tolist()
    return [mean(values[start:end]) for start, end in pairwise(borders.tolist())]


CHECKS = [Check(4, "operators against float64: shapes, dtypes, strides", 2000, against_float64)]
