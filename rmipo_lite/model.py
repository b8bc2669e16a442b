"""The model's side: loading, LoRA, the hidden rows that are scored, and the head's conventions.

The head is applied by our operator, never by the model: `(N, V)` logits are never held. What a
model does between its last hidden state and its logits is therefore read here (`read_head`), and
`selfcheck.py` compares the outcome with the model's own logits before a run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from rmipo_lite.batch import ModelInput
from rmipo_lite.ops import linear_logps
from rmipo_lite.ops.loss import Impl


class UnsupportedModelError(ValueError):
    """This model can't be trained here; the message says what of it and why."""


@dataclass(frozen=True)
class Head:
    """What turns a hidden row into logits: softcap(scale * (h @ weight.T + bias))."""

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    logit_scale: float
    logit_softcap: float | None

    def token_logps(self, hidden: Tensor, target_ids: Tensor, impl: str) -> Tensor:
        """Log-probability of each target, (N,) nats, from hidden rows (N, H)."""
        return linear_logps(
            hidden.to(self.weight.dtype),
            self.weight,
            target_ids,
            bias=self.bias,
            logit_softcap=self.logit_softcap,
            logit_scale=self.logit_scale,
            impl=cast(Impl, impl),
        )


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a possible PeftModel."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(base, PreTrainedModel):
        raise TypeError(
            "model: wanted a name or folder, a transformers PreTrainedModel or a PeftModel, got "
            f"{type(model).__name__}"
        )
    return base


def scored_hidden(model: nn.Module, inputs: ModelInput) -> Tensor:
    """Hidden rows that predict the scored tokens, (N, H), in the model's own dtype."""
    base = causal_lm(model)
    backbone = getattr(base, base.base_model_prefix)
    kwargs: dict[str, Any] = {"input_ids": inputs.input_ids, "use_cache": False}
    if inputs.plan is not None:
        kwargs |= {"position_ids": inputs.position_ids, "segment_plan": inputs.plan}
    else:
        kwargs["attention_mask"] = inputs.attention_mask
    hidden: Tensor = backbone(**kwargs)[0]
    return hidden.reshape(-1, hidden.shape[-1]).index_select(0, inputs.logit_rows)


def read_head(model: nn.Module) -> Head:
    """Read the head's weight and conventions from the model.

    The weight keeps its gradient where the head is trained, carries LoRA or stands in
    `modules_to_save`; the operator then takes its recomputing form.

    Raises:
        UnsupportedModelError: no output layer, or an adapter on it that isn't plain LoRA.
    """
    base = causal_lm(model)
    layer = base.get_output_embeddings()
    if layer is None:
        raise UnsupportedModelError(
            f"model: {type(base).__name__} has no output layer over the vocabulary; a causal "
            "language model is wanted"
        )
    weight, bias = _effective_weight(layer)
    scale, softcap = head_conventions(base.config)
    return Head(weight=weight, bias=bias, logit_scale=scale, logit_softcap=softcap)


def head_conventions(config: Any) -> tuple[float, float | None]:
    """(scale, softcap) that the model's own forward pass applies to its logits."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier"):  # Cohere; Falcon-H1
        factor = getattr(text, name, None)
        scale *= 1.0 if factor is None else float(factor)
    divisor = getattr(text, "logits_scaling", None)  # Granite divides
    scale /= 1.0 if divisor is None else float(divisor)
    softcap = getattr(text, "final_logit_softcapping", None)  # Gemma 2
    return scale, None if softcap is None else float(softcap)


def _effective_weight(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    if isinstance(layer, ModulesToSaveWrapper):
        adapter = layer.active_adapters[0] if layer.active_adapters else None
        layer = layer.modules_to_save[adapter] if adapter else layer.original_module
    if not isinstance(layer, BaseTunerLayer):
        return _plain_weight(layer), getattr(layer, "bias", None)
    base = layer.get_base_layer()
    weight = _plain_weight(base)
    active = [] if layer.disable_adapters or layer.merged else layer.active_adapters
    for adapter in active:
        if adapter not in getattr(layer, "lora_A", {}):
            continue
        if not isinstance(layer, LoraLayer) or layer.use_dora.get(adapter, False):
            raise UnsupportedModelError(
                "model: the output layer carries an adapter that isn't plain LoRA; leave it out "
                "of target_modules"
            )
        weight = weight + layer.get_delta_weight(adapter).to(weight.dtype)
    return weight, getattr(base, "bias", None)


def _plain_weight(layer: nn.Module) -> Tensor:
    weight = cast(Tensor, layer.weight)
    quant_state = getattr(weight, "quant_state", None)
    if quant_state is None:
        return weight
    # A 4-bit head is dequantised once and kept on the layer: it is frozen.
    cached = layer.__dict__.get("_rmipo_dequantized")
    if cached is None or cached.device != weight.device:
        from bitsandbytes.functional import dequantize_4bit

        cached = dequantize_4bit(weight.data, quant_state)
        layer.__dict__["_rmipo_dequantized"] = cached
    return cached


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout of the model to 0: layers, and the numbers that attention modules hold."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "attn_dropout", "dropout"):
            if isinstance(module.__dict__.get(name), float):
                setattr(module, name, 0.0)


def can_checkpoint(model: nn.Module) -> bool:
    """Whether transformers can compute this architecture's activations again."""
    return bool(getattr(causal_lm(model), "supports_gradient_checkpointing", False))


def enable_checkpointing(model: nn.Module) -> None:
    """Compute activations again in the backward pass (the form that keeps hooks and dtypes)."""
    base = causal_lm(model)
    enable = getattr(base, "activation_checkpointing_enable", None)  # transformers 5.20 and newer
    (enable or base.gradient_checkpointing_enable)({"use_reentrant": False})
    # Frozen embeddings have no gradient, and a checkpointed block would pass none on.
    if not hasattr(base, "_require_grads_hook"):
        base.enable_input_require_grads()


def device_of(model: nn.Module) -> torch.device:
    """The one device the model's weights are on.

    Raises:
        UnsupportedModelError: the weights are spread over several devices.
    """
    devices = {p.device for p in model.parameters()}
    if len(devices) != 1:
        raise UnsupportedModelError(
            f"model: its weights are on {len(devices)} devices ({sorted(map(str, devices))}); "
            "load it on one, for example with device_map={'': 0}"
        )
    return devices.pop()
