"""The model's side of a step: company, dropout, and a gradient in every adapter tensor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
from peft import LoraConfig
from torch import Tensor, nn

from rmipo_lite.config import RMiPOConfig
from rmipo_lite.options.method import PriorContext
from rmipo_lite.planning import quantization
from rmipo_lite.step import pair_values
from rmipo_lite.step.pair_step import PairStep
from rmipo_lite.step.pair_values import PairValues
from rmipo_lite.tokens.pair import TokenizedPair
from rmipo_lite.training.trainer import RMiPOTrainer
from tests.kit import ARCHITECTURES, random_pairs, tiny_model, word_tokenizer
from tests.trials.scorecard import Check, Trial, Trials, expect

_TOLERANCE = 1e-5  # nats, fp32
_BOS = 1
_LORA: dict[str, Any] = {"r": 4, "target_modules": "all-linear"}


# ---- company ----------------------------------------------------------------------------------


def batch_invariance(trials: Trials) -> None:
    """Check 23: a pair alone, among others, and beside one ten times as long."""
    names = sorted(ARCHITECTURES)
    for trial in trials:
        with trial:
            rng = trial.rng
            name, packing = rng.choice(names), rng.random() < 0.6
            context: PriorContext = rng.choice(("none", "bos"))
            trial.tried = f"{name}, packing {packing}, prior context {context}"
            # sft_weight is a mean over the step's tokens: there company counts, as it should.
            args = RMiPOConfig(
                str(trial.folder), use_cpu=True, prior_context=context, sft_weight=0.0
            )
            model = tiny_model(name)
            step = PairStep(model, args, 10**6, packing)
            step.prior_front = [_BOS] if context == "bos" else []
            pair, company, long = _companions(rng.getrandbits(32))
            alone = _values(step, [pair])
            for text, pairs in (
                ("in company", [*company, pair]),
                ("first of all", [pair, *company]),
                ("beside a long one", [long, pair]),
            ):
                place = pairs.index(pair)
                _expect_close(alone, _values(step, pairs), place, text)
            own = _gradient(step, [pair])
            whole = _gradient(step, [pair, long]) * 2 - _gradient(step, [long])
            scale = 1 + float(whole.abs().max())
            worst = float((whole - own).abs().max()) / scale
            expect(worst < 1e-4, f"its share of the gradient is off by {worst:.2g}")


def _companions(seed: int) -> tuple[TokenizedPair, list[TokenizedPair], TokenizedPair]:
    """A short pair, some of ragged lengths (one with one-token responses), a very long one."""
    pair, *company = random_pairs(5, seed, longest=8)
    # Random lengths, but no fewer than ten times the short pair's longest side.
    long = random_pairs(1, seed + 1, longest=14)[0]
    long = replace(
        long,
        row=99,
        prompt_ids=(long.prompt_ids * 40)[:40],
        chosen_ids=(long.chosen_ids * 80)[:80],
        rejected_ids=(long.rejected_ids * 80)[:60],
    )
    return pair, company, long


def _values(step: PairStep, pairs: list[TokenizedPair]) -> PairValues:
    return pair_values.concat([values for _, values in step.evaluate(pairs)])


def _expect_close(alone: PairValues, values: PairValues, place: int, text: str) -> None:
    for name in ("loss", "chosen_logps", "rejected_logps", "chosen_pmi", "pmi_gap", "gamma"):
        want, got = getattr(alone, name)[0], getattr(values, name)[place]
        close = torch.isclose(got, want, rtol=1e-5, atol=_TOLERANCE, equal_nan=True)
        expect(close, f"{text}: {name} is {float(got)}, alone it is {float(want)}")


def _gradient(step: PairStep, pairs: list[TokenizedPair]) -> Tensor:
    step.model.zero_grad()
    step.train(pairs, lambda loss: loss.backward())
    return torch.cat([p.grad.flatten() for p in step.model.parameters() if p.grad is not None])


# ---- dropout ----------------------------------------------------------------------------------


def dropout_is_off(trials: Trials) -> None:
    """Check 25: policy and prior pass see one network, by the trainer's own set-up."""
    dropouts: dict[str, dict[str, Any]] = {
        "llama": {"attention_dropout": 0.3},
        "qwen3": {"attention_dropout": 0.3},
        "gemma2": {"attention_dropout": 0.3},
        "phi3": {"attention_dropout": 0.3, "resid_pdrop": 0.3, "embd_pdrop": 0.3},
        "gpt2": {"attn_pdrop": 0.3, "resid_pdrop": 0.3, "embd_pdrop": 0.3},
    }
    for trial in trials:
        with trial:
            name = trial.rng.choice(sorted(dropouts))
            packing = trial.index % 3 != 0
            trial.tried = f"{name}, packing {packing}"
            model = tiny_model(name, **dropouts[name]).train()
            ids = torch.arange(3, 30)[None]
            there = not torch.equal(model(ids).logits, model(ids).logits)
            expect(there, "the model has no dropout to switch off")
            # BOS is the whole prompt: the policy reads what the prior pass reads.
            pairs = [
                replace(pair, prompt_ids=[_BOS])
                for pair in random_pairs(4, trial.rng.getrandbits(32))
            ]
            trainer = RMiPOTrainer(
                model,
                RMiPOConfig(
                    str(trial.folder), use_cpu=True, prior_context="bos", packing=packing,
                    save_strategy="no",
                ),
                train_dataset=pairs,
                processing_class=word_tokenizer(),
                peft_config=LoraConfig(lora_dropout=0.3, init_lora_weights=False, **_LORA),
            )  # fmt: skip
            _expect_one_network(trainer, pairs, packing)


def _expect_one_network(trainer: RMiPOTrainer, pairs: list[TokenizedPair], packing: bool) -> None:
    step = trainer.pair_step
    expect(step.packing == packing, "packing went off by itself")
    trainer.model.train()
    runs = [step.train(pairs, lambda loss: loss.backward()).values for _ in range(2)]
    first, second = (pair_values.concat(run) for run in runs)
    trainer.model.eval()
    third = _values(step, pairs)
    for name in ("chosen_logps", "rejected_logps", "chosen_pmi", "rejected_pmi"):
        values = getattr(first, name)
        expect(torch.equal(values, getattr(second, name)), f"{name}: two passes differ")
        expect(torch.equal(values, getattr(third, name)), f"{name}: training and eval mode differ")
    # Padded, both passes read the very same rows; packed, rows of other lengths.
    largest = float(torch.cat([first.chosen_pmi, first.rejected_pmi, first.pmi_gap]).abs().max())
    allowed = _TOLERANCE if packing else 0.0
    expect(largest <= allowed, f"an empty prompt gives a PMI of {largest:.2g}")


# ---- a gradient in every adapter tensor -------------------------------------------------------


def gradient_everywhere(trials: Trials) -> None:
    """Check 32: checkpointing x 4-bit x bfloat16 x packing, each once."""
    for trial in trials:
        with trial, _repacking_cpu():
            checkpointing, four_bit, bf16, packing = (bool(trial.index >> i & 1) for i in range(4))
            trial.tried = (
                f"checkpointing {checkpointing}, 4-bit {four_bit}, bf16 {bf16}, packing {packing}"
            )
            base = trial.folder / "base"
            name = trial.rng.choice(("llama", "qwen3"))
            tiny_model(name, hidden_size=64, intermediate_size=128).save_pretrained(base)
            args = RMiPOConfig(
                str(trial.folder / "run"), use_cpu=True, bf16=bf16, packing=packing,
                gradient_checkpointing=checkpointing, save_strategy="no",
            )  # fmt: skip
            pairs = random_pairs(4, trial.rng.getrandbits(32))
            trainer = RMiPOTrainer(
                str(base),
                args,
                train_dataset=pairs,
                processing_class=word_tokenizer(),
                peft_config=LoraConfig(init_lora_weights=False, **_LORA),
                quantization_config=quantization.nf4_config(args) if four_bit else None,
            )
            expect(trainer.pair_step.packing == packing, "packing went off by itself")
            expect(trainer.pair_step.checkpointing == checkpointing, "checkpointing isn't as asked")
            before = _adapter_gradients(trainer, pairs)
            # An evaluation must leave the next step's gradients alone.
            trainer.model.eval()
            _values(trainer.pair_step, pairs)
            after = _adapter_gradients(trainer, pairs)
            _expect_gradients(trial, before, after)


@contextmanager
def _repacking_cpu() -> Iterator[None]:
    """A CPU on which bitsandbytes repacks 4-bit weights in eval mode, as newer ones are."""
    with patch.object(
        import_module("bitsandbytes.nn.modules"), "has_avx512bf16", lambda: True, create=True
    ):
        yield


def _adapter_gradients(trainer: RMiPOTrainer, pairs: list[TokenizedPair]) -> dict[str, Any]:
    model: nn.Module = trainer.model.train()
    model.zero_grad()
    outcome = trainer.pair_step.train(pairs, trainer.accelerator.backward)
    expect(not outcome.dropped, "pairs were dropped as not finite")
    return {n: p.grad for n, p in model.named_parameters() if "lora_" in n}


def _expect_gradients(trial: Trial, before: dict[str, Any], after: dict[str, Any]) -> None:
    expect(len(before) == 2 * 7 * 2, f"{len(before)} adapter tensors, not 28")
    for text, grads in (("", before), (" after an evaluation", after)):
        for name, grad in grads.items():
            expect(grad is not None, f"{name} has no gradient{text}")
            expect(grad.isfinite().all() and grad.abs().max() > 0, f"{name} has none{text}")
            if text:
                expect(torch.allclose(grad, before[name], rtol=1e-4, atol=1e-6), name + text)


CHECKS = [
    Check(23, "a pair alone, in company, beside one ten times longer", 100, batch_invariance),
    Check(25, "policy and prior see one network, without dropout", 20, dropout_is_off, least=6),
    Check(32, "a gradient in every adapter tensor", 16, gradient_everywhere, least=6),
]
