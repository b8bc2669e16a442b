"""What must not leak, and what must not overflow: garbage beside the scored rows, extreme numbers.

An unscored position is passed over, never multiplied by zero: 0 * NaN is NaN. A number that isn't
finite stays in its own row or pair and is seen there.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from rmipo_lite.adapters.base_model import causal_lm
from rmipo_lite.model import batch
from rmipo_lite.model.attention import packed_attention
from rmipo_lite.model.backbone import scored_hidden
from rmipo_lite.model.batch import ModelInput
from rmipo_lite.model.head import read_head
from rmipo_lite.ops import linear_logps, pair_loss, rmipo_loss
from rmipo_lite.ops.reference import IGNORED
from rmipo_lite.tokens.pair import TokenizedPair
from tests.kit import VOCAB, random_pairs, tiny_model
from tests.trials.numbers.operands import DTYPES, any_impl, random_head, seeded
from tests.trials.numbers.truth import Formula, pair_truth
from tests.trials.scorecard import Check, Trial, Trials, expect

_FILLERS = {"NaN": math.nan, "inf": math.inf, "-inf": -math.inf, "huge": 6e4, "zero": 0.0}
_GARBAGE = ("NaN", "inf", "-inf", "huge", "random")


def unscored_positions(trials: Trials) -> None:
    """Check 20: the head's ignored rows, and the rows of a packed and a padded batch."""
    kinds = (_ignored_rows, _rows_of_a_batch, _rows_of_a_batch)
    for trial in trials:
        with trial:
            kinds[trial.index % 3](trial)


def _fill(values: Tensor, mask: Tensor, kind: str, rng: random.Random) -> Tensor:
    """A copy with garbage in the rows of the mask."""
    filled = values.clone()
    noise = torch.randn(values.shape, generator=seeded(rng)) * 100
    filler = torch.full_like(noise, _FILLERS[kind]) if kind in _FILLERS else noise
    filled[mask] = filler.to(values.dtype)[mask]
    return filled


def _ignored_rows(trial: Trial) -> None:
    rng, kind = trial.rng, trial.rng.choice(_GARBAGE)
    case = random_head(rng, least_rows=2)
    ids = case.target_ids.clone()
    ids[torch.rand(len(ids), generator=seeded(rng)) < 0.4] = IGNORED
    ids[rng.randrange(len(ids))] = IGNORED
    case.target_ids = ids
    case.mode = rng.choice(("direction", "recompute"))
    trial.tried = f"{kind} in {int((ids == IGNORED).sum())} ignored rows of {case}"
    results = []
    for hidden in (
        _fill(case.hidden, ids == IGNORED, kind, rng),
        _fill(case.hidden, ids == IGNORED, "zero", rng),  # in the same memory layout
    ):
        case.hidden = hidden
        leaves = case.leaves()
        logps = case.logps(*leaves)
        logps.sum().backward()
        grads = [leaf.grad for leaf in leaves if leaf is not None]
        results.append([logps.detach(), *(grad for grad in grads if grad is not None)])
    _expect_same_bits(results)


def _expect_same_bits(results: list[list[Tensor]]) -> None:
    for place, (with_garbage, clean) in enumerate(zip(*results, strict=True)):
        expect(clean.isfinite().all(), f"result {place} isn't finite even without garbage")
        expect(torch.equal(with_garbage, clean), f"result {place} changed")


def _rows_of_a_batch(trial: Trial) -> None:
    """Hidden rows that predict nothing scored, and the token that pads."""
    rng, kind = trial.rng, trial.rng.choice(_GARBAGE)
    packing = trial.index % 3 == 1
    name = rng.choice(("llama", "qwen3", "gemma2", "gpt2"))
    model = tiny_model(name)
    pairs = random_pairs(rng.randint(2, 5), rng.getrandbits(32))
    trial.tried = f"{kind} in unscored hidden rows, {name}, packing {packing}, {len(pairs)} pairs"
    pad_id = rng.randrange(VOCAB)
    results = []
    for filler, pad in ((kind, pad_id), ("zero", 0)):
        model.zero_grad()
        loss = _step_loss(model, pairs, packing, pad, partial(_fill, kind=filler, rng=rng))
        loss.sum().backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        results.append([loss.detach(), *grads])
    _expect_same_bits(results)


def _step_loss(
    model: nn.Module,
    pairs: Sequence[TokenizedPair],
    packing: bool,
    pad_id: int,
    fill: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Loss per pair as a step computes it, with `fill` applied to the unscored hidden rows."""
    policy = batch.policy_input(pairs, packing, pad_id)
    token_logps = _score(model, policy, packing, fill)
    prior = batch.prior_input(pairs, packing, (), pad_id)
    with torch.no_grad():
        prior_logps = _score(model, prior, packing, fill)
    return pair_loss(token_logps, policy.cu_seqlens, prior_logps, prior.cu_seqlens).loss


def _score(
    model: nn.Module,
    inputs: ModelInput,
    packing: bool,
    fill: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    def spoil(module: nn.Module, args: object, output: Tensor) -> Tensor:
        rows = output.reshape(-1, output.shape[-1])
        unscored = torch.ones(len(rows), dtype=torch.bool)
        unscored[inputs.logit_rows] = False
        return fill(rows, unscored).view(output.shape)

    base = causal_lm(model)
    backbone = getattr(base, base.base_model_prefix)
    # The last module of the backbone: its output is what the head reads.
    norm = backbone.ln_f if hasattr(backbone, "ln_f") else backbone.norm
    hook = norm.register_forward_hook(spoil)
    try:
        if packing:
            with packed_attention(model):
                hidden = scored_hidden(model, inputs)
        else:
            hidden = scored_hidden(model, inputs)
    finally:
        hook.remove()
    return read_head(model).token_logps(hidden, inputs.target_ids, "auto")


# ---- extreme values ---------------------------------------------------------------------------

_LOGITS = (1e4, -1e4, 65504.0, -65504.0, 100.0, -100.0, 0.0, 1.0)
_MARGINS = (-1e4, -60.0, -5.0, 0.0, 5.0, 20.0, 60.0, 1e4)
_GAPS = (-math.inf, -1e4, -1.0, -0.0, 0.0, 1.0, 50.0, 200.0, 1e4, math.inf, math.nan)


def extreme_values(trials: Trials) -> None:
    """Check 21: logits to 65,504 and -inf, then the tables of margins and of gaps."""
    kinds = (_extreme_logits, _margins, _gaps)
    for trial in trials:
        with trial:
            kinds[trial.index % 3](trial)


def _extreme_logits(trial: Trial) -> None:
    """Rows that are the weights times 1, -1, 0 and NaN, and a vocabulary masked by its bias."""
    rng = trial.rng
    dtype, impl = rng.choice(DTYPES), any_impl(rng)
    vocab = rng.choice((1, 8, 97, 3001))
    softcap = rng.choice((None, 30.0))
    masked = rng.choice(("no token", "some tokens", "every token"))
    trial.tried = f"logits, {dtype} {impl}, V={vocab}, softcap {softcap}, {masked} at -inf"
    factors = torch.tensor([1.0, -1.0, 0.0, math.nan, 1.0, 0.5])
    weight = torch.tensor([rng.choice(_LOGITS) for _ in range(vocab)])[:, None].to(dtype)
    bias = torch.zeros(vocab)
    if masked != "no token":
        share = 1.0 if masked == "every token" else 0.3
        bias[torch.rand(vocab, generator=seeded(rng)) < share] = -math.inf
    ids = torch.tensor([rng.randrange(vocab) for _ in factors])
    leaf = factors[:, None].to(dtype).requires_grad_()
    logps = linear_logps(leaf, weight, ids, bias=bias.to(dtype), logit_softcap=softcap, impl=impl)
    logps.sum().backward()
    logits = factors[:, None].double() * weight[:, 0].double() + bias.double()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    want = torch.log_softmax(logits, dim=-1).gather(1, ids[:, None])[:, 0]
    expect(torch.equal(logps.isnan(), want.isnan()), f"NaN in other rows: {logps.tolist()}")
    expect(logps[3].isnan(), "the NaN of row 3 was lost")
    # 65504 in float32 is told to 0.004.
    close = torch.isclose(logps.double(), want, rtol=1e-6, atol=1e-5, equal_nan=True)
    expect(close.all(), f"{logps.tolist()} for {want.tolist()}")
    slope = 1.0 if softcap is None else 1 - (logits / softcap) ** 2
    probabilities = torch.softmax(logits, dim=-1)
    direction = nn.functional.one_hot(ids, vocab) - probabilities
    grad = (direction * slope) @ weight.double()
    assert leaf.grad is not None
    # float16 itself ends at 65,504.
    told = want.isfinite() & (grad[:, 0].abs() < 6e4)
    error = (leaf.grad.double() - grad)[told].abs()
    expect((error <= 2**-6 * weight.abs().max()).all(), f"gradient off by {error.tolist()}")


def _margins(trial: Trial) -> None:
    rng = trial.rng
    formula = Formula(
        loss_type=rng.choice(("rmipo", "simpo", "hinge")),
        beta=rng.choice((0.5, 2.0)),
        gamma_scaled_by_beta=rng.random() < 0.5,
    )
    impl = any_impl(rng)
    trial.tried = f"margins, {impl}, {formula}"
    means = [x for margin in _MARGINS for x in (margin / formula.beta, 0.0)]
    leaf = torch.tensor(means, requires_grad=True)
    borders = torch.arange(len(means) + 1, dtype=torch.int32)
    out = pair_loss(leaf, borders, torch.zeros(len(means)), borders, impl=impl, **vars(formula))
    out.loss.sum().backward()
    assert leaf.grad is not None
    expect(out.loss.isfinite().all(), f"the loss isn't finite: {out.loss.tolist()}")
    expect((leaf.grad[0::2] <= 0).all(), "a gradient of a chosen mean above 0")
    expect((leaf.grad[0::2] >= -formula.beta).all(), "a gradient of a chosen mean below -beta")
    truths = [pair_truth((means[2 * p], 0.0), (0.0, 0.0), formula) for p in range(len(_MARGINS))]
    for name, got, want in (
        ("loss", out.loss, [t.loss for t in truths]),
        ("gradient", leaf.grad[0::2], [t.grad_chosen for t in truths]),
        ("gradient", leaf.grad[1::2], [t.grad_rejected for t in truths]),
    ):
        # Relative: 4e-18 is not 0.
        close = torch.isclose(got.double(), torch.tensor(want).double(), rtol=1e-6, atol=1e-44)
        expect(close.all(), f"{name} is {got.tolist()}, should be {want}")


def _gaps(trial: Trial) -> None:
    rng = trial.rng
    low, high = rng.choice(((0.3, 1.6), (0.3, 0.3), (0.0, 10.0)))
    impl, dtype = any_impl(rng), rng.choice((torch.float32, torch.float64))
    scaled = rng.random() < 0.5
    trial.tried = f"gaps, {impl} {dtype}, gamma in [{low}, {high}], scaled {scaled}"
    # The gap comes from the prior alone, so that every policy mean is an ordinary number.
    prior = torch.tensor([-gap for gap in _GAPS], dtype=dtype)
    chosen = torch.zeros(len(_GAPS), dtype=dtype, requires_grad=True)
    nothing = torch.zeros(len(_GAPS), dtype=dtype)
    out = rmipo_loss(
        chosen, nothing, prior, nothing, impl=impl,
        gamma_min=low, gamma_max=high, gamma_scaled_by_beta=scaled,
    )  # fmt: skip
    out.loss.sum().backward()
    assert chosen.grad is not None
    for place, gap in enumerate(_GAPS):
        gamma, loss = float(out.gamma[place]), float(out.loss[place])
        if math.isnan(gap):
            expect(math.isnan(gamma) and math.isnan(loss), "a gap that is NaN was lost")
            continue
        slack = 1e-7 * high
        expect(low - slack <= gamma <= high + slack, f"gamma is {gamma} at a gap of {gap}")
        want = low + (high - low) * math.exp(-max(0.0, gap))
        expect(abs(gamma - want) <= 1e-6, f"gamma is {gamma} at a gap of {gap}, should be {want}")
        expect(math.isfinite(loss), f"the loss is {loss} at a gap of {gap}")
        expect(chosen.grad[place].isfinite(), f"no finite gradient at a gap of {gap}")


CHECKS = [
    Check(20, "NaN, inf, garbage in every unscored position", 200, unscored_positions, least=100),
    Check(21, "extreme logits, margins and gaps", 60, extreme_values, least=60),
]
