"""Every kind of output layer: the model's own logits, or a refusal that says why.

A head that is read wrongly trains without a word on other log-probs than the model's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from rmipo_lite.model import batch
from rmipo_lite.model.backbone import UnsupportedModelError, scored_hidden
from rmipo_lite.model.head import read_head
from rmipo_lite.model.packing_check import packing_problem
from rmipo_lite.selftest.parts import VOCAB, random_pairs, tiny_model
from rmipo_lite.selftest.scorecard import Check, Lost, Trials, expect
from rmipo_lite.tokens.pair import TokenizedPair

_WIDTH = 32


def head_variants(trials: Trials) -> None:
    """Check 31: one kind of head for each trial."""
    for trial in trials:
        with trial:
            trial.tried, make, refused = VARIANTS[trial.index]
            model = make()
            pairs = random_pairs(4, trial.rng.getrandbits(32))
            if refused:
                _expect_refusal(model, pairs)
            else:
                _expect_own_logits(model, pairs)


def _expect_refusal(model: nn.Module, pairs: list[TokenizedPair]) -> None:
    """Before training: reading the head, or comparing it with the model's own logits."""
    try:
        read_head(model)
        packing_problem(model, pairs, "auto", 0)
    except UnsupportedModelError as error:
        expect("model" in str(error), f"refused without saying why: {error}")
        return
    raise Lost("not refused")


def _expect_own_logits(model: nn.Module, pairs: list[TokenizedPair]) -> None:
    """Values, and the gradient of what is trained of the head, here and through the logits."""
    expect(packing_problem(model, pairs, "auto", 0) is None, "the self-check found a difference")
    inputs = batch.policy_input(pairs, packing=False)
    hidden = scored_hidden(model, inputs)
    ours = read_head(model).token_logps(hidden, inputs.target_ids, "auto")
    logits = model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask).logits
    rows = logits.reshape(-1, logits.shape[-1])[inputs.logit_rows]
    own = rows.log_softmax(-1).gather(1, inputs.target_ids[:, None])[:, 0]
    worst = float((ours - own).abs().max())
    expect(worst <= 1e-5, f"log-probs differ from the model's own by {worst:.2g} nats")
    trained = [p for p in model.parameters() if p.requires_grad]
    a, b = (_gradients(logps, trained) for logps in (ours, own))
    for got, want in zip(a, b, strict=True):
        close = torch.allclose(got, want, rtol=1e-4, atol=1e-4 * (1 + float(want.abs().max())))
        expect(close, f"a gradient differs by {float((got - want).abs().max()):.2g}")
    expect(any(want.abs().max() > 0 for want in b), "nothing is trained")


def _gradients(logps: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    grads = torch.autograd.grad(logps.sum(), parameters, allow_unused=True)
    return [
        torch.zeros_like(parameter) if grad is None else grad
        for parameter, grad in zip(parameters, grads, strict=True)
    ]


def _cohere() -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "cohere", vocab_size=VOCAB, hidden_size=_WIDTH, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, logit_scale=0.25, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def _with_bias() -> nn.Module:
    model = tiny_model()
    model.lm_head = nn.Linear(_WIDTH, VOCAB, bias=True)
    nn.init.normal_(model.lm_head.bias)
    return model


def _with_lora(name: str = "llama", **options: Any) -> nn.Module:
    config = LoraConfig(r=4, init_lora_weights=False, **options)
    model = get_peft_model(tiny_model(name), config)
    if "modules_to_save" in options:
        with torch.no_grad():
            read_head(model).weight.add_(0.3)  # no longer the base model's
    return model.eval()


def _four_bit(quant_type: str) -> nn.Module:
    """A head whose weight is stored in 4 bits, under LoRA elsewhere."""
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    model = tiny_model()
    head = Linear4bit(
        _WIDTH, VOCAB, bias=False, compute_dtype=torch.float32, quant_type=quant_type
    )  # fmt: skip
    head.weight = Params4bit(
        model.lm_head.weight.detach(), requires_grad=False, quant_type=quant_type
    )  # fmt: skip
    # Its packed kernel for newer CPUs computes in bfloat16.
    head.support_avx512bf16_for_cpu = False
    model.lm_head = head.to("cpu")
    config = LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj"])
    return get_peft_model(model, config).eval()


def _scaled_in_its_forward() -> nn.Module:
    model = tiny_model()
    forward = model.lm_head.forward
    model.lm_head.forward = lambda hidden: 3.0 * forward(hidden)
    return model


# What it is, the model, whether it is to be refused.
VARIANTS: list[tuple[str, Callable[[], nn.Module], bool]] = [
    ("bias", _with_bias, False),
    ("LoRA on the head", lambda: _with_lora(target_modules=["q_proj", "lm_head"]), False),
    ("4-bit head, nf4", lambda: _four_bit("nf4"), False),
    # More rows than the tokenizer has tokens: every row counts in the softmax.
    ("padded vocabulary", lambda: tiny_model(vocab_size=128), False),
    ("softcap", lambda: tiny_model("gemma2"), False),
    ("logit scale that multiplies", _cohere, False),
    ("logit scale that divides", lambda: tiny_model("granite"), False),
    ("tied to the embeddings", lambda: tiny_model(tie_word_embeddings=True), False),
    (
        "a trained copy of the head",
        lambda: _with_lora(target_modules=["q_proj"], modules_to_save=["lm_head"]),
        False,
    ),
    (
        "softcap and LoRA on the head",
        lambda: _with_lora("gemma2", target_modules=["q_proj", "lm_head"]),
        False,
    ),
    ("DoRA on the head", lambda: _with_lora(target_modules=["lm_head"], use_dora=True), True),
    ("a scale that no one knows of", _scaled_in_its_forward, True),
]
CHECKS = [Check(31, "every kind of output layer", len(VARIANTS), head_variants, 2, least=12)]
