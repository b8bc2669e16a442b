"""The whole step against the method as a reader of the paper would write it: one pair at a time.

One forward pass per response, nothing padded, nothing packed, the model's own logits, a plain
log_softmax and Python loops, all in float64. Where the authors' code differs from the paper it is
`gamma_scaled_by_beta`, and both are tried. The one rule that neither states is ours: a response
whose prior scores no token gives its pair a gap of 0.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from rmipo_lite.config import RMiPOConfig
from rmipo_lite.options.method import PriorContext
from rmipo_lite.selftest.models import response_logps
from rmipo_lite.step.pair_step import PairStep
from rmipo_lite.step.pair_values import PairValues
from rmipo_lite.tokens.pair import TokenizedPair
from tests.kit import random_pairs, tiny_model
from tests.trials.numbers.truth import Formula, PairTruth, mean, pair_truth
from tests.trials.scorecard import Check, Trials, expect

_TOLERANCE = 1e-6  # some models take norms and softmax in float32 whatever their own dtype
_ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "granite", "gpt2")
_BOS = 1


@dataclass(frozen=True)
class _Slow:
    """A pair as the loops see it."""

    chosen: list[float]  # token log-probs, nats
    rejected: list[float]
    chosen_prior: float  # mean, NaN where it has no token
    rejected_prior: float
    truth: PairTruth


def against_loops(trials: Trials) -> None:
    """Check 12: values and loss of a step, packed or padded, whole or in micro-steps."""
    for trial in trials:
        with trial:
            rng = trial.rng
            name, has_lora = rng.choice(_ARCHITECTURES), rng.random() < 0.5
            model = _adapted(tiny_model(name)) if has_lora else tiny_model(name)
            model = model.double().eval()
            # transformers' eager attention gives NaN for a padded float64 row that a window masks.
            packing = rng.random() < 0.7 or name == "gemma2"
            context: PriorContext = rng.choice(("none", "bos"))
            formula = _random_formula(rng)
            pairs = _random_pairs(rng, packing)
            sft_weight, budget = rng.choice((0.0, 0.5)), rng.choice((60, 10**6))
            trial.tried = (
                f"{name}{' with LoRA' if has_lora else ''}, {len(pairs)} pairs, packing {packing}, "
                f"prior context {context}, {budget} tokens, {formula}"
            )
            args = RMiPOConfig(
                str(trial.folder),
                use_cpu=True,
                prior_context=context,
                sft_weight=sft_weight,
                **{k: v for k, v in vars(formula).items() if k != "simpo_gamma"},
            )
            step = PairStep(model, args, budget, packing)
            step.prior_front = [_BOS] if context == "bos" else []
            slow = {pair.row: _slowly(model, pair, step.prior_front, formula) for pair in pairs}
            for part, values in step.evaluate(pairs):
                _expect_equal(values, [slow[pair.row] for pair in part])
            got = float(step.train(pairs, lambda loss: loss.backward()).loss)
            want = fmean(slow[pair.row].truth.loss for pair in pairs)
            chosen = [logp for pair in pairs for logp in slow[pair.row].chosen]
            want -= sft_weight * mean(chosen)
            expect(
                abs(got - want) <= _TOLERANCE * (1 + want), f"the step's loss is off: {got} {want}"
            )


def _adapted(model: nn.Module) -> nn.Module:
    """The model with LoRA on every linear layer, of weights that change its output."""
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(model, config)


def _random_formula(rng: random.Random) -> Formula:
    return Formula(
        beta=rng.choice((0.5, 2.0, 10.0)),
        gamma_min=0.3,
        gamma_max=rng.choice((0.3, 1.6)),
        gamma_scaled_by_beta=rng.random() < 0.5,
        label_smoothing=rng.choice((0.0, 0.1)),
    )


def _random_pairs(rng: random.Random, packing: bool) -> list[TokenizedPair]:
    pairs = random_pairs(rng.randint(1, 5), rng.getrandbits(32))
    if not packing and rng.random() < 0.3:  # what the authors' border repair can give
        pairs[0] = replace(pairs[0], rejected_prompt_ids=[*pairs[0].prompt_ids, 7])
    return pairs


def _slowly(model: nn.Module, pair: TokenizedPair, front: Sequence[int], formula: Formula) -> _Slow:
    other = pair.prompt_ids if pair.rejected_prompt_ids is None else pair.rejected_prompt_ids
    chosen = response_logps(model, pair.prompt_ids, pair.chosen_ids)
    rejected = response_logps(model, other, pair.rejected_ids)
    priors = [
        mean(response_logps(model, list(front), ids))
        for ids in (pair.chosen_ids, pair.rejected_ids)
    ]
    truth = pair_truth((mean(chosen), mean(rejected)), (priors[0], priors[1]), formula)
    return _Slow(chosen, rejected, priors[0], priors[1], truth)


def _expect_equal(values: PairValues, slow: Sequence[_Slow]) -> None:
    wanted = {
        "chosen_logps": [mean(s.chosen) for s in slow],
        "rejected_logps": [mean(s.rejected) for s in slow],
        "chosen_pmi": [mean(s.chosen) - s.chosen_prior for s in slow],
        "rejected_pmi": [mean(s.rejected) - s.rejected_prior for s in slow],
        "pmi_gap": [s.truth.pmi_gap for s in slow],
        "gamma": [s.truth.gamma for s in slow],
        "loss": [s.truth.loss for s in slow],
        "chosen_length": [len(s.chosen) for s in slow],
        "rejected_length": [len(s.rejected) for s in slow],
    }
    for name, want in wanted.items():
        got = getattr(values, name).double()
        truth = torch.tensor(want, dtype=torch.float64)
        close = torch.isclose(got, truth, rtol=_TOLERANCE, atol=_TOLERANCE, equal_nan=True)
        expect(close.all(), f"{name} is {got.tolist()}, the loops say {want}")


CHECKS = [Check(12, "step against the method in loops, float64", 200, against_loops)]
