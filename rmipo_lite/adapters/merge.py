"""The trained model without an adapter: a copy whose weights have the adapter's added in.

The model itself stays as it is, and weights that no adapter touches are shared with it. A 4-bit
model is dequantised first: it is what was trained and evaluated. Rounding the sum to 4 bits again
loses 6 to 42 % of the training (KL; measured on two models), since an update below a step of the
quantisation vanishes; in 16 bits the sum is 2e-4 nats a token from the trained model.
"""

import copy
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear, LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_bnb_weight
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from rmipo_lite.adapters.attach import ADAPTED
from rmipo_lite.adapters.base_model import causal_lm
from rmipo_lite.adapters.embeddings import EMBEDDINGS
from rmipo_lite.adapters.start import START
from rmipo_lite.parallel.sharded import is_sharded

# What transformers leaves on a quantised model, so that it is saved and moved as one.
_OF_QUANTISATION = (
    "hf_quantizer", "is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method", "is_quantized",
)  # fmt: skip
_QUANTISED = ("Params4bit", "Int8Params")


@torch.no_grad()
def merged_copy(
    model: PeftModel, dtype: torch.dtype | None = None, stored: torch.dtype | None = None
) -> PreTrainedModel:
    """The adapter merged into a copy of the model.

    Args:
        model: stays as it is.
        dtype: of all floating weights; None takes bfloat16 for quantised ones, else `stored`.
        stored: what the base model's files are in; None keeps the weights as they are.

    Raises:
        ValueError: this adapter can't be merged; the message says which layer and why.
    """
    if is_sharded(model):
        raise ValueError(
            "model: its layers are shared out among processes (FSDP2), each has a part of them; "
            "merge the saved folder in one process: rmipo-lite merge RUN FOLDER"
        )
    base = causal_lm(model)
    # What stands in `memo` isn't copied: weights are shared, and the copy knows no adapter.
    memo: dict[int, Any] = {id(t): t for t in (*base.parameters(), *base.buffers())}
    memo |= {id(vars(base)[name]): None for name in (ADAPTED, START) if name in vars(base)}
    twin: PreTrainedModel = copy.deepcopy(base, memo)
    for name in (ADAPTED, START, EMBEDDINGS):
        vars(twin).pop(name, None)
    is_quantised = any(type(p).__name__ in _QUANTISED for p in base.parameters())
    dtype = dtype or (torch.bfloat16 if is_quantised else stored)
    for name, module in reversed(list(twin.named_modules())):  # what is inside, first
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            _replace(twin, name, _merged(name, module, dtype))
    for name, module in list(twin.named_modules()):
        weight = getattr(module, "weight", None)
        if type(weight).__name__ in _QUANTISED:
            _replace(twin, name, _plain(module, dtype))
    _cast(twin, dtype)
    _forget_adapter(twin, is_quantised)
    return twin


def _cast(twin: nn.Module, dtype: torch.dtype | None) -> None:
    """Frozen weights in place of the shared ones; buffers (of positions) stay as exact as they are.

    In place of, since a change in place would be one of the trained model too.
    """
    cast: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # tied ones stay tied
    for module in twin.modules():
        for name, weight in module.named_parameters(recurse=False):
            changes = dtype is not None and weight.is_floating_point() and weight.dtype != dtype
            if changes or weight.requires_grad:
                new = nn.Parameter(weight.detach().to(dtype if changes else weight.dtype), False)
                setattr(module, name, cast.setdefault(id(weight), (new, weight))[0])


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _merged(name: str, layer: Any, dtype: torch.dtype | None) -> nn.Module:
    """The layer that stands for one with an adapter."""
    if isinstance(layer, ModulesToSaveWrapper):
        kept: nn.Module = layer.modules_to_save[layer.active_adapters[0]]
        return kept
    if isinstance(layer, AuxiliaryTrainingWrapper):  # trained tokens: what is inside, merged
        inner: nn.Module = layer.token_adapter
        return inner
    own = layer.get_base_layer()
    kinds = [p.dtype for p in own.parameters() if type(p).__name__ not in _QUANTISED]
    is_quantised = type(getattr(own, "weight", None)).__name__ in _QUANTISED
    plain = _plain(own, torch.float32) if is_quantised else own
    for key, weight in list(plain.named_parameters(recurse=False)):  # in fp32, rounded once
        setattr(plain, key, nn.Parameter(weight.detach().float().clone(), requires_grad=False))
    if is_quantised and not isinstance(layer, LoraLayer):
        raise ValueError(
            f"merge: {name} has quantised weights and an adapter that isn't LoRA; save the "
            "adapter, load the base model in 16 bits and merge there by peft"
        )
    if is_quantised:
        layer.base_layer = plain
    try:
        # peft's own merge of quantised layers rounds the sum to their bits again
        (LoraLinear.merge if is_quantised else type(layer).merge)(layer, safe_merge=True)
    except Exception as error:  # of many kinds of adapter
        raise ValueError(f"merge: {name}: {type(error).__name__}: {error}") from error
    merged: nn.Module = layer.get_base_layer()  # some kinds put another module there
    _cast(merged, dtype or (kinds[0] if kinds else None))
    return merged


def _plain(layer: Any, dtype: torch.dtype | None) -> nn.Linear:
    """A quantised linear layer as an ordinary one."""
    weight: Tensor = dequantize_bnb_weight(layer.weight, getattr(layer, "state", None))
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    plain.weight = nn.Parameter(weight.to(dtype or weight.dtype), requires_grad=False)
    plain.bias = layer.bias
    return plain


def _forget_adapter(twin: PreTrainedModel, is_quantised: bool) -> None:
    """Take off what says that the model has an adapter or quantised weights."""
    for name in ("peft_config", "_hf_peft_config_loaded"):
        vars(twin).pop(name, None)
    if is_quantised:
        for name in _OF_QUANTISATION:
            vars(twin).pop(name, None)
        for name in ("quantization_config", "_is_quantized"):
            vars(twin.config).pop(name, None)
    head: Any = twin.get_output_embeddings()
    embedding: Any = twin.get_input_embeddings()
    if twin.config.tie_word_embeddings and head is not None:
        if torch.equal(head.weight, embedding.weight):
            head.weight = embedding.weight
        else:  # one of the two was trained: they are two from now on
            twin.config.tie_word_embeddings = False
