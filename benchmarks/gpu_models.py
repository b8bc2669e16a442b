"""Random weights in the exact shapes of known models, 4-bit where that is how they are trained.

Nothing is downloaded, and no matrix is ever held in full beside its 4-bit form but the one that is
being made, so that an 8B model is built on an 8 GB card.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config

from rmipo_lite.model.loading import protect_4bit_on_cpu

_SCALE = 0.02  # of random weights
# Of a head of its own: logits as flat as need be, whose log-probs rounding can't throw far off.
_HEAD_SCALE = 0.005


class ModelShape(NamedTuple):
    """A model by its shape, and whether its linear layers are stored in 4 bits."""

    config: type[PreTrainedConfig]
    options: dict[str, Any]
    quantized: bool


SHAPES = {
    "Llama-3-8B": ModelShape(
        LlamaConfig,
        {
            "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
            "max_position_embeddings": 8192, "tie_word_embeddings": False,
        },
        quantized=True,
    ),
    "Qwen2.5-3B": ModelShape(
        Qwen2Config,
        {
            "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 11008,
            "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2,
            "max_position_embeddings": 32768, "tie_word_embeddings": True,
        },
        quantized=True,
    ),
    "Qwen2.5-0.5B": ModelShape(
        Qwen2Config,
        {
            "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
            "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
            "max_position_embeddings": 32768, "tie_word_embeddings": True,
        },
        quantized=False,
    ),
    # of no known model: small enough to rehearse on a CPU
    "rehearsal": ModelShape(
        Qwen2Config,
        {
            "vocab_size": 503, "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 512, "tie_word_embeddings": True,
        },
        quantized=True,
    ),
}  # fmt: skip


def random_model(name: str, device: torch.device) -> nn.Module:
    """The model `name` of `SHAPES` on a device, its weights drawn there."""
    shape = SHAPES[name]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = shape.config(**shape.options, dtype=dtype)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    torch.manual_seed(0)
    if shape.quantized:
        _quantize(model.model.layers, dtype, device)
        model.is_loaded_in_4bit = True  # peft looks for this before it wraps a 4-bit layer
    _draw(model, device)
    model.tie_weights()
    # Its frequencies are buffers, which were never computed on the meta device.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    protect_4bit_on_cpu(model)
    return model.requires_grad_(False)


def _quantize(layers: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Put an NF4 layer of random weights in the place of every linear one."""
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    for parent in list(layers.modules()):
        for name, linear in list(parent.named_children()):
            if not isinstance(linear, nn.Linear):
                continue
            full = torch.empty(linear.weight.shape, dtype=dtype, device=device).normal_(0, _SCALE)
            packed = Linear4bit(
                linear.in_features,
                linear.out_features,
                bias=linear.bias is not None,
                compute_dtype=dtype,
                compress_statistics=True,
                quant_type="nf4",
                device="meta",
            )
            weight: Any = Params4bit(
                full, requires_grad=False, compress_statistics=True, quant_type="nf4",
                module=packed,
            )  # fmt: skip
            packed.weight = weight.to(device)  # which packs it
            setattr(parent, name, packed)


def _draw(model: nn.Module, device: torch.device) -> None:
    """Give every weight that is still on the meta device a value: norms ones, biases zeros."""
    for place, module in model.named_modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if weight.device.type != "meta":
                continue
            values = torch.empty(weight.shape, dtype=weight.dtype, device=device)
            if weight.dim() > 1:
                values.normal_(0, _HEAD_SCALE if place == "lm_head" else _SCALE)
            else:
                values.fill_(0.0 if name == "bias" else 1.0)
            module.register_parameter(name, nn.Parameter(values, requires_grad=False))
