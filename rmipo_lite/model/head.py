"""A model's output layer as our operator needs it: weight, bias, conventions of its logits."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn import functional

from rmipo_lite.adapters.base_model import causal_lm
from rmipo_lite.model.backbone import UnsupportedModelError
from rmipo_lite.ops import linear_logps
from rmipo_lite.ops.native import Impl

# From here on p(end) is no longer taken as p / (1 - p) times what is left to the others: that is a
# large number times a small one, and a model in 16 bits says 1 where it means nearly 1.
_NEARLY_CERTAIN, _LARGEST_P = 0.9, 0.999


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

    def copied(self) -> "ModelHead":
        """The same numbers where nobody writes to them."""
        bias = None if self.bias is None else self.bias.detach().clone()
        return replace(self, weight=self.weight.detach().clone(), bias=bias)

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, V) fp32 from hidden rows (N, H): for few rows, these are large."""
        product = (hidden.to(self.weight.dtype) @ self.weight.T).float()
        return self._logit(product, product.new_zeros(()) if self.bias is None else self.bias)

    def lead_of(self, token_id: int, hidden: Tensor, token_ids: Tensor) -> Tensor:
        """Logit of one token minus that of each row's own, (N,) fp32, from hidden rows (N, H)."""
        # Taken in one go: of a trained head each would have a gradient of the weight's size.
        ids = functional.pad(token_ids, (0, 1), value=token_id)
        weight = self.weight[ids].float()
        bias = torch.zeros_like(weight[:, 0]) if self.bias is None else self.bias[ids]
        hidden = hidden.float()
        one = self._logit(hidden @ weight[-1], bias[-1])
        return one - self._logit((hidden * weight[:-1]).sum(-1), bias[:-1])

    def _logit(self, product: Tensor, bias: Tensor) -> Tensor:
        logit = (product + bias.float()) * self.logit_scale
        if self.logit_softcap is None:
            return logit
        return self.logit_softcap * torch.tanh(logit / self.logit_softcap)


def end_nll(
    head: ModelHead,
    hidden: Tensor,  # (N, H) rows that predict the scored tokens, in the order C1 R1 C2 R2 ...
    token_logps: Tensor,  # (N,) nats
    target_ids: Tensor,  # (N,) int64
    lengths: Sequence[tuple[int, int]],  # scored tokens of chosen and rejected of each of P pairs
    end_id: int,
) -> Tensor:  # (P,)
    """Where each chosen response ends, as a likelihood of its own: nats per response, (P,).

        - log p(end | at its end) - sum over its other tokens of log (1 - p(end | there))

    A loss of per-token means moves the end token by what the two lengths are, not by what is liked,
    and in either direction without a limit: answers that never end, or empty ones. This is the
    hazard of ending, learnt from the chosen responses: its gradient on the end token's logit is
    p(end) - [the response ends here], so ending too early costs as much as not ending. A response
    that was cut has no end, and only the second term.
    """
    starts = list(accumulate((sum(both) for both in lengths), initial=0))
    rows = [
        start + i
        for start, (chosen, _) in zip(starts, lengths, strict=False)
        for i in range(chosen)
    ]
    pair_of_row = [index for index, (chosen, _) in enumerate(lengths) for _ in range(chosen)]
    # Counted here and not from borders on the device, which would have to be waited for.
    index = torch.tensor(rows, dtype=torch.int64).to(hidden.device)
    hidden, token_logps, target_ids = hidden[index], token_logps[index], target_ids[index]
    lead = head.lead_of(end_id, hidden, target_ids)
    # p(end) from what is known: log p(target) and the two logits' difference.
    nll = torch.where(target_ids == end_id, -token_logps, _not_ending_nll(token_logps + lead, lead))
    pairs = torch.tensor(pair_of_row, dtype=torch.int64).to(hidden.device)
    return nll.new_zeros(len(lengths)).index_add_(0, pairs, nll)


def _not_ending_nll(end_logps: Tensor, lead: Tensor) -> Tensor:
    """-log(1 - p), (N,), with its slope p on the end token's logit.

    Where p is nearly 1 the rest of the gradient, -p spread over the other tokens, goes to the row's
    own token alone (`lead`: the end's logit minus its).
    """
    p = end_logps.detach().exp()
    most = p.clamp(max=_NEARLY_CERTAIN)
    exact = most / (1 - most) * (end_logps - end_logps.detach())
    slope = torch.where(p > _NEARLY_CERTAIN, p.clamp(max=1.0) * (lead - lead.detach()), exact)
    return slope - torch.log1p(-p.clamp(max=_LARGEST_P))


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
