"""float16's range: families that leave it, and a model that is tried."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig

import rmipo_lite
from rmipo_lite.config import RMiPOConfig
from rmipo_lite.planning.half_range import (
    keep_family_in_range,
    keep_model_in_range,
    leaves_half,
)
from tests.kit import random_pairs, tiny_model


def _on_a_card_without_bf16(tmp_path: Path) -> RMiPOConfig:
    args = RMiPOConfig(str(tmp_path), use_cpu=True)
    args.fp16, args.mixed_precision = True, "fp16"
    return args


def _named(config: Any, folder: Path) -> str:
    config.save_pretrained(folder)
    return str(folder)


def _far(model: Any, down: float) -> Any:
    """The model with hidden states that pass 65,504; the last norm scales them back."""
    with torch.no_grad():
        model.model.embed_tokens.weight *= 60_000 / model.model.embed_tokens.weight.abs().max()
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight *= 10
            layer.mlp.down_proj.weight *= down
    return model


def test_a_model_whose_numbers_are_too_large_computes_in_float32(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args, pairs = _on_a_card_without_bf16(tmp_path), random_pairs(6)
    usual, far = tiny_model("llama").half(), _far(tiny_model("llama"), 100).half()
    assert not leaves_half(usual, pairs)
    assert leaves_half(far, pairs)
    keep_model_in_range(usual, pairs, args)
    assert args.dtype == torch.float16
    assert capsys.readouterr().out == ""
    keep_model_in_range(far, pairs, args)
    assert (args.dtype, args.weights_dtype) == (torch.float16, torch.float32)
    assert {p.dtype for p in far.parameters()} == {torch.float32}
    assert not leaves_half(far, pairs)
    assert "products float16" in capsys.readouterr().out
    farther = _far(tiny_model("llama"), 1e4)  # its products too
    keep_model_in_range(farther, pairs, args)
    assert (args.dtype, args.mixed_precision) == (torch.float32, "no")
    assert "the run computes in float32" in capsys.readouterr().out


def test_what_somebody_asked_for_stays(tmp_path: Path) -> None:
    args = _on_a_card_without_bf16(tmp_path)
    args._half_is_open = False
    keep_family_in_range(_named(Gemma3TextConfig(), tmp_path), args)
    keep_model_in_range(_far(tiny_model("llama"), 1e4), random_pairs(2), args)
    assert args.dtype == torch.float16


def test_a_known_family_is_seen_before_it_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = _on_a_card_without_bf16(tmp_path)
    keep_family_in_range(_named(LlamaConfig(), tmp_path), args)
    assert args.weights_dtype == torch.float16
    keep_family_in_range(_named(Gemma3TextConfig(), tmp_path), args)
    assert (args.dtype, args.weights_dtype) == (torch.float16, torch.float32)
    assert "hidden states of gemma3_text models leave float16" in capsys.readouterr().out


def test_estimate_knows_the_family() -> None:
    config = Gemma3TextConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, vocab_size=512,
    )  # fmt: skip
    on = {gpu: rmipo_lite.estimate(config, gpu=gpu) for gpu in ("T4", "3060")}
    assert {gpu: found.fit.weights for gpu, found in on.items()} == {"T4": "fp32", "3060": "bf16"}
    assert "hidden states of this family are float32" in str(on["T4"])
    assert "hidden states of this family" not in str(on["3060"])
    assert rmipo_lite.estimate(config, gpu="T4", fp16=True).fit.weights == "fp16"
