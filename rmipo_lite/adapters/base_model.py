"""The transformers model inside: what an adapter sits on, or what is trained as a whole."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftMixedModel, PeftModel
from torch import nn
from transformers import PreTrainedModel


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a possible PeftModel.

    Raises:
        TypeError: it is something else; the message names it.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if isinstance(base, PeftModel):
        raise TypeError(
            "model: a PeftModel inside another one; load the inner adapter into the base model by "
            "model.load_adapter(folder, name), or merge it first"
        )
    if isinstance(base, PeftMixedModel):
        raise TypeError(
            "model: adapters of several kinds at once (PeftMixedModel) are not supported; pass a "
            "PeftModel with one of them"
        )
    if not isinstance(base, PreTrainedModel):
        raise TypeError(
            "model: wanted a name or folder, a transformers PreTrainedModel or a PeftModel, got "
            f"{type(model).__name__}"
        )
    return base


def packed_weights(model: nn.Module) -> set[int]:
    """The ids of 4-bit weights: bits, whatever dtype they are stored as."""
    layers = [m for m in model.modules() if type(m).__name__ in ("Linear4bit", "Embedding4bit")]
    return {id(parameter) for layer in layers for parameter in layer.parameters(recurse=False)}


@contextmanager
def quiet_peft() -> Iterator[None]:
    """What peft's making of a model warns of and its user can do nothing about isn't shown."""
    with warnings.catch_warnings():
        # peft asks for transformers' former name of activation checkpointing
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        # and says which way round gpt2 keeps its weights, which it then sees to itself
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False")
        yield
