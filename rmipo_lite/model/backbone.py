"""The transformers model inside: the hidden rows that are scored, its modes, its device.

It runs up to its last hidden state. The head is applied by our operator (`head.read_head`), so that
`(N, V)` logits are never held.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from rmipo_lite.adapters.base_model import causal_lm
from rmipo_lite.adapters.embeddings import plain_embedding
from rmipo_lite.model.batch import ModelInput


class UnsupportedModelError(ValueError):
    """This model can't be trained here; the message says what of it and why."""


def scored_hidden(model: nn.Module, inputs: ModelInput) -> Tensor:
    """Hidden rows that predict the scored tokens, (N, H), in the model's own dtype.

    They are on the device of the inputs, also of a model whose layers are on several.
    """
    base = causal_lm(model)
    backbone = getattr(base, base.base_model_prefix)
    kwargs: dict[str, Any] = {"input_ids": inputs.input_ids}
    if inputs.plan is not None:
        kwargs |= {"position_ids": inputs.position_ids}
    else:
        kwargs["attention_mask"] = inputs.attention_mask
    if is_spread(model):  # the first layers may be elsewhere than the head, which inputs are for
        first = plain_embedding(base).weight.device
        kwargs = {name: value.to(first) for name, value in kwargs.items()}
    if inputs.plan is not None:
        kwargs["segment_plan"] = inputs.plan
    hidden: Tensor = backbone(use_cache=False, **kwargs)[0]
    rows = hidden.reshape(-1, hidden.shape[-1])
    return rows.to(inputs.logit_rows.device).index_select(0, inputs.logit_rows)


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout of the model to 0: layers, and the numbers that modules hold."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in dropout_numbers(module):
            setattr(module, name, 0.0)


def dropout_numbers(module: nn.Module) -> list[str]:
    """Names of the numbers that a module passes to dropout: attention_dropout and its like."""
    return [
        name
        for name, value in vars(module).items()
        if isinstance(value, float) and name.endswith(("dropout", "pdrop"))
    ]


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


@contextmanager
def checkpointed_layers(model: nn.Module, layers: int, count: int) -> Iterator[None]:
    """After `enable_checkpointing`: inside the block only the first `count` of so many are.

    All of them, where an architecture's can't be told apart and some are to be.
    """
    modules: list[Any] = [
        m for m in causal_lm(model).modules() if hasattr(m, "gradient_checkpointing")
    ]
    before = [module.gradient_checkpointing for module in modules]
    blocks = [m for m in modules if isinstance(m, GradientCheckpointingLayer)]
    first = set(blocks[:count] if len(blocks) == layers else blocks)
    for module in modules:
        module.gradient_checkpointing = count > 0 and (module in first or module not in blocks)
    try:
        yield
    finally:
        for module, was in zip(modules, before, strict=True):
            module.gradient_checkpointing = was


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and every module's own mode back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def is_spread(model: nn.Module) -> bool:
    """Whether layers were put on several devices, by `device_map`: a row goes through them in turn.

    Accelerate's hooks carry it from one to the next.
    """
    return len(devices_of(model)) > 1


def devices_of(model: nn.Module) -> list[torch.device]:
    """Where the model's weights are, the device of the first one first."""
    return list(dict.fromkeys(parameter.device for parameter in model.parameters()))


def device_of(model: nn.Module) -> torch.device:
    """The device that rows are scored on: of the weights, or of the head of a spread model.

    Raises:
        UnsupportedModelError: weights are on several devices and nothing carries a row from one to
            the next, or they are offloaded.
    """
    devices = devices_of(model)
    if len(devices) == 1:
        return devices[0]
    base = causal_lm(model)
    if any(device.type == "meta" for device in devices):
        raise UnsupportedModelError(
            "model: some of its weights are offloaded to memory or disk; load fewer bits "
            "(quantization='4bit'), or put all of it on GPUs"
        )
    if not isinstance(getattr(base, "hf_device_map", None), dict):
        raise UnsupportedModelError(
            f"model: its weights are on {len(devices)} devices ({sorted(map(str, devices))}); "
            "load it on one, for example with device_map={'': 0}, or with device_map='auto'"
        )
    head = base.get_output_embeddings()
    return devices[-1] if head is None else next(head.parameters()).device
