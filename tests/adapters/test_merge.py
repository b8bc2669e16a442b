"""The merged copy is the trained model, in other words; the trained model stays as it is."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from rmipo_lite.adapters.merge import merged_copy
from rmipo_lite.results.agreement import agreement
from tests.kit import VOCAB, tiny_model

_IDS = torch.arange(24).reshape(2, 12) * 7 % (VOCAB - 4) + 3


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.eval()(input_ids=_IDS).logits.float()
    return result


def _strong(model: Any, **options: Any) -> PeftModel:
    wanted = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    adapted = get_peft_model(model, LoraConfig(**wanted))
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.1)
    return adapted


def _four_bit(folder: Path, compute: torch.dtype = torch.float32) -> Any:
    tiny_model("llama", hidden_size=64, intermediate_size=128).save_pretrained(folder)
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32
    )


def test_the_trained_model_stays_and_shares_what_no_adapter_touches() -> None:
    model = _strong(tiny_model("llama", tie_word_embeddings=False))
    before = _logits(model)
    twin = merged_copy(model)
    assert torch.equal(_logits(model), before)
    torch.testing.assert_close(_logits(twin), before, atol=1e-4, rtol=1e-4)
    assert not any("lora" in name for name, _ in twin.named_modules())
    assert twin.get_input_embeddings().weight is model.get_input_embeddings().weight
    assert twin.config is not model.config


@pytest.mark.filterwarnings("ignore:Merge lora module to 4-bit linear")
def test_a_four_bit_model_is_dequantised_first(tmp_path: Path) -> None:
    model = _strong(_four_bit(tmp_path / "base"))
    before = _logits(model)
    exact = merged_copy(model, torch.float32)
    torch.testing.assert_close(_logits(exact), before, atol=2e-4, rtol=2e-4)
    half = merged_copy(model)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    half.save_pretrained(tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert torch.equal(_logits(plain), _logits(half.float()))
    assert torch.equal(_logits(model), before)
    # and rounding to 4 bits again, as peft's own merge does, is a thousand times further away
    near = agreement(model, plain, _IDS.tolist())
    again = agreement(model, _as_peft_does(model), _IDS.tolist())
    assert near is not None
    assert again is not None
    assert near.tokens == 24
    assert near.kl < 1e-3 < again.kl
    assert near.kl < 0.02 * again.kl


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_an_eight_bit_model_becomes_one_of_ordinary_layers(tmp_path: Path) -> None:
    tiny_model("llama", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=BitsAndBytesConfig(load_in_8bit=True)
    )
    model = _strong(base)
    twin = merged_copy(model, torch.float32)
    twin.save_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(plain.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert torch.equal(_logits(plain), _logits(twin))
    found = agreement(model, plain, _IDS.tolist())
    assert found is not None
    assert found.kl < 5e-3  # eight-bit products round activations too


def _as_peft_does(model: PeftModel) -> Any:
    return copy.deepcopy(model).merge_and_unload()


def test_dora_on_four_bit(tmp_path: Path) -> None:
    model = _strong(_four_bit(tmp_path / "base"), use_dora=True)
    torch.testing.assert_close(
        _logits(merged_copy(model, torch.float32)), _logits(model), atol=5e-4, rtol=5e-4
    )


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lora_bias": True}, "merge: .*base layer has no bias"),
        (None, "an adapter that isn't LoRA"),
    ],
)
def test_what_cannot_be_merged_is_told(options: Any, words: str, tmp_path: Path) -> None:
    base = _four_bit(tmp_path / "base")
    if options is None:
        config = IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
        model: Any = get_peft_model(base, config)
    else:
        model = _strong(base, **options)
    before = _logits(model)
    with pytest.raises(ValueError, match=words):
        merged_copy(model)
    assert torch.equal(_logits(model), before)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_trained_ends_of_a_tied_model_are_two_afterwards(tmp_path: Path) -> None:
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = _strong(base, target_modules=["q_proj"], modules_to_save=["lm_head"])
    with torch.no_grad():
        model.get_output_embeddings().modules_to_save["default"].weight.add_(0.1)
    twin = merged_copy(model)
    assert twin.config.tie_word_embeddings is False
    twin.save_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(_logits(plain), _logits(model), atol=1e-4, rtol=1e-4)
