"""LoRA layers in fewer passes over memory: y = base(x) + scaling * (x A^T) B^T.

peft adds `lora_B(lora_A(x)) * scaling` to the base layer's output: a product, a scaled copy and a
sum, each as long as the output, and under autocast two casts of the input whose results every
layer keeps for its backward pass. Here the scaling is applied to the (N, r) factor, the second
product accumulates into the base layer's output, and what is kept is the input itself, which the
layers that share it (q, k, v) share too. The numbers are the same up to rounding.

Of a 4-bit base layer peft copies the output first, as a guard against views of it that are changed
in place: what bitsandbytes returns is a tensor of its own, which is written into here.

Only a plain LoRA layer is taken: one active adapter, a linear or 4-bit base layer without hooks of
its own, no DoRA or other variant, no dropout. Everything else keeps peft's own forward.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

_CAST_BY_AUTOCAST = (torch.float32, torch.bfloat16, torch.float16)


class _AddLora(torch.autograd.Function):
    """Base (N, out) += scaling * (x A^T) B^T, in place."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        base: Tensor,  # (N, out)
        x: Tensor,  # (N, in) same dtype
        a: Tensor,  # (r, in)
        b: Tensor,  # (out, r)
        scaling: float,
    ) -> Tensor:
        low_a, low_b = a.to(base.dtype), b.to(base.dtype)
        low = torch.mm(x, low_a.T).mul_(scaling)
        ctx.save_for_backward(x, low_a, low_b, low)
        ctx.scaling, ctx.dtypes = scaling, (a.dtype, b.dtype)
        ctx.mark_dirty(base)
        return base.addmm_(low, low_b.T)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        x, a, b, low = ctx.saved_tensors
        grad_low = torch.mm(grad, b).mul_(ctx.scaling)
        grad_x = torch.mm(grad_low, a) if ctx.needs_input_grad[1] else None
        grad_a = torch.mm(grad_low.T, x).to(ctx.dtypes[0])
        # (low^T grad)^T: the long operand is read along its rows
        grad_b = torch.mm(low.T, grad).T.to(ctx.dtypes[1])
        return grad, grad_x, grad_a, grad_b, None


def _forward(self: LoraLinear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What a plain LoRA layer runs inside `fused_lora`."""
    (adapter,) = self.active_adapters
    is_linear = type(self) is LoraLinear
    a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
    rows, device = x.reshape(-1, x.shape[-1]), x.device.type
    # A model on no device at all, whose passes are only counted (footprint.py), has no autocast.
    is_autocast = device != "meta" and torch.is_autocast_enabled(device)
    if is_autocast and x.dtype in _CAST_BY_AUTOCAST:
        rows = rows.to(torch.get_autocast_dtype(device))
    elif x.dtype != a.dtype or (is_linear and self.base_layer.weight.dtype != a.dtype):
        # The adapter is to be computed in another precision than the base layer: peft's rules.
        return type(self).forward(self, x, *args, **kwargs)
    base = self.base_layer(rows)
    with torch.autocast(device, enabled=False) if is_autocast else nullcontext():
        out = _AddLora.apply(base, rows, a, b, self.scaling[adapter])
    # A 4-bit layer answers in the precision it was asked in, under autocast too.
    out = out if is_linear else out.to(x.dtype)
    return out.view(*x.shape[:-1], out.shape[-1])


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody's hooks or forward are on a module, which another forward would pass by."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in kinds) or "forward" in vars(module)


def _is_known(layer: Any) -> bool:
    """Whether the classes of a LoRA layer and its base layer are ones that are computed here."""
    if type(layer) is LoraLinear:
        return type(layer.base_layer) is nn.Linear
    # Where nobody loaded bitsandbytes' layers, none is of their class.
    adapted, base = sys.modules.get("peft.tuners.lora.bnb"), sys.modules.get("bitsandbytes.nn")
    return (
        adapted is not None
        and base is not None
        and type(layer) is getattr(adapted, "Linear4bit", None)
        and type(layer.base_layer) in (base.Linear4bit, base.LinearNF4, base.LinearFP4)
    )


def is_plain(layer: Any) -> bool:
    """Whether a module is a LoRA layer that `fused_lora` computes."""
    if not _is_known(layer):
        return False
    if "forward" in vars(layer) or has_hooks(layer.base_layer):
        return False
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return False
    adapter = layer.active_adapters[0]
    dropout = dict(layer.lora_dropout.items()).get(adapter)
    return (
        adapter in layer.lora_A
        and not has_hooks(layer.lora_A[adapter])
        and not has_hooks(layer.lora_B[adapter])
        and adapter not in layer.lora_variant
        and layer.lora_A[adapter].bias is None
        and layer.lora_B[adapter].bias is None
        and (not isinstance(dropout, nn.Dropout) or dropout.p == 0)
        and not layer.fan_in_fan_out
    )


@contextmanager
def fused_lora(model: nn.Module) -> Iterator[None]:
    """Let plain LoRA layers run in fewer passes inside the block, and peft's way after it.

    The backward pass belongs inside: gradient checkpointing runs the forward pass again in it.
    """
    layers = [module for module in model.modules() if is_plain(module)]
    for layer in layers:
        layer.forward = MethodType(_forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
