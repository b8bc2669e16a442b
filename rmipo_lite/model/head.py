"""A model's output layer as our operator needs it: weight, bias, conventions of its logits."""

from dataclasses import dataclass
from typing import Any, cast

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from rmipo_lite.adapters.base_model import causal_lm
from rmipo_lite.model.backbone import UnsupportedModelError
from rmipo_lite.ops import linear_logps
from rmipo_lite.ops.native import Impl


@dataclass(frozen=True)
class ModelHead:
    """What turns a hidden row into logits: softcap(scale * (h @ weight.T + bias))."""

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    logit_softcap: float | None
    logit_scale: float

    def token_logps(self, hidden: Tensor, target_ids: Tensor, impl: Impl) -> Tensor:
        """Log-probability of each target, (N,) nats, from hidden rows (N, H)."""
        return linear_logps(
            hidden.to(self.weight.dtype),
            self.weight,
            target_ids,
            bias=self.bias,
            logit_softcap=self.logit_softcap,
            logit_scale=self.logit_scale,
            impl=impl,
        )


def read_head(model: nn.Module) -> ModelHead:
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
    softcap, scale = head_conventions(base.config)
    return ModelHead(weight=weight, bias=bias, logit_softcap=softcap, logit_scale=scale)


def head_conventions(config: Any) -> tuple[float | None, float]:
    """(softcap, scale) that the model's own forward pass applies to its logits."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier"):  # Cohere; Falcon-H1
        factor = getattr(text, name, None)
        scale *= 1.0 if factor is None else float(factor)
    divisor = getattr(text, "logits_scaling", None)  # Granite divides
    scale /= 1.0 if divisor is None else float(divisor)
    softcap = getattr(text, "final_logit_softcapping", None)  # Gemma 2
    return None if softcap is None else float(softcap), scale


def _effective_weight(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    if isinstance(layer, ModulesToSaveWrapper):
        adapter = layer.active_adapters[0] if layer.active_adapters else None
        layer = layer.modules_to_save[adapter] if adapter else layer.original_module
    if not isinstance(layer, BaseTunerLayer):
        return _plain_weight(layer), getattr(layer, "bias", None)
    base = layer.get_base_layer()
    weight, bias = _plain_weight(base), getattr(base, "bias", None)
    if layer.disable_adapters or layer.merged:
        return weight, bias
    if not isinstance(layer, LoraLayer) or any(layer.use_dora.values()):
        raise UnsupportedModelError(
            "model: the output layer carries an adapter that isn't plain LoRA; leave it out of "
            "target_modules"
        )
    for adapter in layer.active_adapters:
        if adapter not in layer.lora_A:
            continue
        weight = weight + layer.get_delta_weight(adapter).to(weight.dtype)
        own = layer.lora_B[adapter].bias  # lora_bias=True
        if own is not None:
            added = layer.scaling[adapter] * own.to(weight.dtype)
            bias = added if bias is None else bias + added
    return weight, bias


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
