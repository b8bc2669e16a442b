from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import (
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
)

from rmipo_lite.adapters.attach import attach_adapter
from rmipo_lite.adapters.lora import lora_config
from rmipo_lite.model import batch
from rmipo_lite.model.attention import packed_attention
from rmipo_lite.model.backbone import checkpointed_layers, enable_checkpointing, scored_hidden
from rmipo_lite.model.fused_lora import fused_lora
from rmipo_lite.planning import footprint
from rmipo_lite.planning.footprint import Setup, activations_of, optimizer_width, weights_of
from tests.kit import random_pairs

_FP32, _BF16 = (Setup(dtype, lora_config()) for dtype in (torch.float32, torch.bfloat16))


def _llama(layers: int = 4, **options: Any) -> LlamaConfig:
    sizes = {"hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 97}  # fmt: skip
    return LlamaConfig(num_hidden_layers=layers, **(sizes | options))


def test_weights_are_those_of_the_model() -> None:
    """A layer: q, o 128 x 128; k, v 64 x 128; gate, up, down 320 x 128."""
    config = _llama()
    model = LlamaForCausalLM(config)
    weights = weights_of(config, _FP32)
    assert weights.layers == 4 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 320 * 128)
    assert weights.layers + weights.others == sum(p.numel() for p in model.parameters())
    assert (weights.head, weights.largest) == (97 * 128, 320 * 128)
    adapted = attach_adapter(model, "new")
    assert weights.trained == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    whole = weights_of(config, Setup(torch.float32, None))
    assert whole.trained == whole.layers + whole.others
    assert whole.layers == weights.layers


def test_bytes_by_hand() -> None:
    weights = footprint.Weights(layers=6400, others=100, head=50, largest=640, trained=10)
    four_bit = Setup(torch.bfloat16, lora_config(), quantized=True)
    assert weights.loaded_bytes(_BF16) == 13000
    # half a byte, a byte in 64 and four in 16,384, and the others in 16 bits
    assert weights.loaded_bytes(four_bit) == 3200 + 100 + 1 + 200
    assert (weights.dequantised_bytes(four_bit), weights.dequantised_bytes(_BF16)) == (1280, 0)
    assert weights.adapter_bytes(_BF16) == weights.gradient_bytes(_BF16) == 40
    whole = Setup(torch.bfloat16, None)
    assert (weights.adapter_bytes(whole), weights.gradient_bytes(whole)) == (0, 20)


@pytest.mark.parametrize(("name", "width"), [("adamw_torch", 8), ("adamw_8bit", 2), ("sgd", 0)])
def test_optimizers(name: str, width: int) -> None:
    assert optimizer_width(name) == width


@pytest.mark.parametrize("inner", [64, 640])
def test_a_count_is_what_autograd_keeps(inner: int) -> None:
    """Measured by collecting every tensor saved for backward, on pairs of other lengths."""
    config = _llama(layers=5, intermediate_size=inner)
    model = attach_adapter(LlamaForCausalLM(config), "new").train()
    inputs = batch.policy_input(random_pairs(6, longest=200), packing=True)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with packed_attention(model), fused_lora(model), hooks:
        assert scored_hidden(model, inputs).requires_grad
    kept = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    count = activations_of(config, _FP32, False).bytes_of(inputs.num_tokens)
    # The count is a peak: what is kept, and what passes through one block.
    assert kept < count < 1.35 * kept


def test_layers_and_tokens_are_carried_on() -> None:
    """What is carried on from three layers is what a count of all of them gives."""
    config = _llama(layers=9)
    for checkpointing in (False, True):
        carried = activations_of(config, _FP32, checkpointing)
        tokens = 5 * batch.packed_length(footprint._PAIR)
        counted = footprint._peak(config, _FP32, 9, 5, checkpointing=checkpointing)
        assert carried.bytes_of(tokens) == pytest.approx(counted, rel=0.02)


def test_the_first_layers_take_no_more_than_their_share() -> None:
    """Measured: what a micro-step is cut by where as many layers as needed are computed again."""
    config = _llama(layers=6)
    model = attach_adapter(LlamaForCausalLM(config), "new").train()
    enable_checkpointing(model)
    inputs = batch.policy_input(random_pairs(6, longest=200), packing=True)

    def peak(count: int) -> int:
        live = footprint._LiveBytes(list(model.parameters()))
        with checkpointed_layers(model, 6, count), live, packed_attention(model), fused_lora(model):
            scored_hidden(model, inputs).sum().backward()
        return live.peak

    peaks = [peak(count) for count in range(7)]
    assert peaks[6] < 0.5 * peaks[0]
    for count, taken in enumerate(peaks):
        assert taken <= 1.01 * (peaks[0] + (peaks[6] - peaks[0]) * count / 6)


def test_a_pass_without_gradient_is_one_layer_at_a_time() -> None:
    few, many = (
        footprint.activations_without_gradient(_llama(layers=n), _FP32).per_token for n in (4, 24)
    )
    assert many == pytest.approx(few, rel=0.01)
    assert many < activations_of(_llama(layers=24), _FP32, True).per_token


def test_checkpointing_keeps_less_and_half_precision_too() -> None:
    config = _llama(layers=12)
    whole = activations_of(config, _FP32, False).per_token
    assert activations_of(config, _FP32, True).per_token < whole / 4
    assert 0.5 * whole < activations_of(config, _BF16, False).per_token < 0.9 * whole


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(n_embd=64, n_layer=5, n_head=2, vocab_size=99),
        Qwen2Config(hidden_size=64, intermediate_size=128, num_hidden_layers=5,
                    num_attention_heads=2, num_key_value_heads=2, vocab_size=99),
        pytest.param(
            Gemma2Config(hidden_size=64, intermediate_size=128, num_hidden_layers=6, head_dim=32,
                         num_attention_heads=2, num_key_value_heads=1, vocab_size=99),
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda config: type(config).__name__,
)  # fmt: skip
def test_architectures_are_counted(config: Any) -> None:
    for setup in (_BF16, Setup(torch.bfloat16, lora_config(), quantized=True)):
        for checkpointing in (False, True):
            assert activations_of(config, setup, checkpointing).counted
    assert weights_of(config, _BF16).layers > 0


def test_what_cannot_be_counted_takes_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers of 16 x 32 + 5 x 64 floats, and the head's direction; checkpointed one of them."""

    def fail(*args: Any) -> int:
        raise RuntimeError("an architecture that reads its input's values")

    monkeypatch.setattr(footprint, "_peak", fail)
    config = _llama(layers=2, hidden_size=32, intermediate_size=64)
    found = activations_of(config, Setup(torch.float32, None), False)
    assert not found.counted
    assert found.per_token == 2 * (16 * 32 + 5 * 64) * 4 + 4 * 32
    again = activations_of(config, Setup(torch.float32, None), True)
    assert again.per_token == (2 * 32 + 16 * 32 + 5 * 64) * 4 + 4 * 32


def test_what_is_trained_in_full_is_counted_without_its_gradients() -> None:
    config = _llama(layers=6, vocab_size=50021)
    whole = activations_of(config, Setup(torch.float32, None), False)
    embedding = 50021 * 128 * 4
    assert whole.counted
    assert whole.fixed < embedding / 10
    adapted = activations_of(config, _FP32, False)
    assert whole.per_token == pytest.approx(adapted.per_token, rel=0.25)


def test_a_count_is_made_once_and_draws_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    config = _llama(layers=7)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = activations_of(config, _FP32, False)
    assert torch.equal(torch.rand(3), expected)
    monkeypatch.setattr(footprint, "_peak", None)
    assert activations_of(_llama(layers=7), Setup(torch.float32, lora_config()), False) is first


def test_the_setup_of_a_loaded_model() -> None:
    model = LlamaForCausalLM(_llama(layers=2))
    assert footprint.setup_of(model, torch.float32) == Setup(torch.float32, None, False)
    lora = LoraConfig(r=4, target_modules=["q_proj"])
    setup = footprint.setup_of(attach_adapter(model, lora), torch.bfloat16)
    assert setup.peft_config is not None
    assert (setup.dtype, setup.peft_config.r, setup.quantized) == (torch.bfloat16, 4, False)
    config = model.config
    assert weights_of(config, setup).trained == 2 * 4 * (128 + 128)
