"""The head's conventions: our token log-probs against the model's own logits."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from rmipo_lite.adapters.base_model import causal_lm
from rmipo_lite.model import batch
from rmipo_lite.model.backbone import UnsupportedModelError, disable_dropout, scored_hidden
from rmipo_lite.model.head import read_head
from rmipo_lite.model.packing_check import packing_problem
from tests.kit import VOCAB, random_pairs, tiny_model


def _both(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = batch.policy_input(random_pairs(), packing=False)
    hidden = scored_hidden(model, inputs)
    ours = read_head(model).token_logps(hidden, inputs.target_ids, "auto")
    logits = model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask).logits
    rows = logits.reshape(-1, logits.shape[-1])[inputs.logit_rows]
    return ours, rows.log_softmax(-1).gather(1, inputs.target_ids[:, None])[:, 0]


def _cohere() -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "cohere",
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        logit_scale=0.25,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return AutoModelForCausalLM.from_config(config)


def _with_bias() -> nn.Module:
    model = tiny_model("llama")
    model.lm_head = nn.Linear(32, VOCAB, bias=True)
    nn.init.normal_(model.lm_head.bias)
    return model


def _head_with(**lora: object) -> nn.Module:
    config = LoraConfig(r=4, init_lora_weights=False, **lora)
    model = get_peft_model(tiny_model("llama"), config)
    if "modules_to_save" in lora:
        with torch.no_grad():
            read_head(model).weight.add_(0.3)
    return model


@pytest.mark.parametrize(
    "make",
    [
        lambda: tiny_model("llama"),
        lambda: tiny_model("gemma2"),
        lambda: tiny_model("granite"),
        lambda: tiny_model("llama", tie_word_embeddings=True),
        _cohere,
        _with_bias,
        lambda: _head_with(target_modules=["q_proj", "lm_head"]),
        lambda: _head_with(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    ],
    ids=["plain", "softcap", "divides", "tied", "scale", "bias", "lora-on-head", "saved-head"],
)
def test_head_equals_the_models_own(make) -> None:
    ours, own = _both(make())
    torch.testing.assert_close(ours, own, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: _head_with(target_modules=["q_proj", "lm_head"]),
        lambda: _head_with(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    ],
    ids=["lora-on-head", "saved-head"],
)
def test_a_trained_head_has_its_gradient(make) -> None:
    """The single pass would lose it without a word."""
    model = make()
    ours, own = _both(model)
    names = [n for n, p in model.named_parameters() if p.requires_grad and "lm_head" in n]
    parameters = [dict(model.named_parameters())[n] for n in names]
    assert parameters
    for a, b in zip(
        torch.autograd.grad(ours.sum(), parameters),
        torch.autograd.grad(own.sum(), parameters),
        strict=True,
    ):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_dora_on_the_head_is_refused() -> None:
    model = _head_with(target_modules=["lm_head"], use_dora=True)
    with pytest.raises(UnsupportedModelError, match="leave it out of target_modules"):
        read_head(model)


def test_an_unread_head_is_refused_before_training() -> None:
    """A model that scales its logits in a way we don't know must not train on other ones."""
    model = tiny_model("llama")
    forward = model.lm_head.forward
    model.lm_head.forward = lambda hidden: 3.0 * forward(hidden)
    with pytest.raises(UnsupportedModelError, match="logits differ by"):
        packing_problem(model, random_pairs(), "auto", 0)


def test_not_a_model() -> None:
    with pytest.raises(TypeError, match="wanted a name or folder, a transformers PreTrainedModel"):
        causal_lm(nn.Linear(2, 2))


def test_disable_dropout_reaches_layers_and_attention() -> None:
    model = tiny_model("gpt2", attn_pdrop=0.3, resid_pdrop=0.3, embd_pdrop=0.3).train()
    ids = torch.arange(3, 13)[None]
    assert not torch.equal(model(ids).logits, model(ids).logits)
    disable_dropout(model)
    assert torch.equal(model(ids).logits, model(ids).logits)
    llama = tiny_model("llama", attention_dropout=0.3).train()
    disable_dropout(llama)
    assert torch.equal(llama(ids).logits, llama(ids).logits)
    # Seed-OSS' name of it
    llama.model.layers[0].residual_dropout = 0.1
    disable_dropout(llama)
    assert llama.model.layers[0].residual_dropout == 0.0
