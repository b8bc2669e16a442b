"""LoRA on a model: attached once, gone on with, taken off; never nested."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from rmipo_lite.adapters.base_model import causal_lm, quiet_peft
from rmipo_lite.adapters.embeddings import EMBEDDINGS, look_at_embeddings
from rmipo_lite.adapters.lora import Adapter, adapter_config, lora_config, refuse_another
from rmipo_lite.adapters.refusals import (
    refuse_changed_base,
    refuse_kind,
    refuse_start,
    refuse_state,
    refuse_tied_lora,
    refuse_untrained,
)
from rmipo_lite.adapters.start import (
    START,
    changes_base,
    fill,
    own_start_of,
    remember_start,
    start_of,
)

# Where the model itself remembers its PeftModel, so that a second train() on the same object goes
# on with that adapter. In __dict__: nn.Module would register it as a child of itself.
ADAPTED = "_rmipo_lite_adapted"


def attach_adapter(model: nn.Module, peft_config: Adapter, args: Any = None) -> nn.Module:
    """Give the model its adapter, or leave it the one it has. Never nests.

    Args:
        model: a PreTrainedModel or a PeftModel.
        peft_config: "auto" goes on with the adapter the model carries, else attaches
            `lora_config()`; "new" removes what it carries and attaches a fresh default one; a
            peft config, or a dict of its fields, likewise, with that configuration; None attaches
            nothing (an adapter goes on, a plain model is trained in full).
        args: the run's options, whose `lora_r` and its kind change the default.

    Raises:
        ValueError: the model carries adapter layers that belong to no known PeftModel, or the
            argument is none of the above, fits no layer of the model or puts LoRA on tied
            embeddings or head.
    """
    known = (
        peft_config in ("auto", "new")
        if isinstance(peft_config, str)
        else (peft_config is None or isinstance(peft_config, (PeftConfig, Mapping)))
    )
    if not known:
        shown = repr(peft_config)[:80]
        raise ValueError(f"peft_config must be 'auto', 'new', None or a peft config, got {shown}")
    config = adapter_config(peft_config, args)
    adapted = _adapted(model)
    if adapted is not None and (peft_config is None or peft_config == "auto"):
        refuse_another(adapted, args)
        refuse_kind(_trainable(adapted.active_peft_config))
        refuse_state(adapted)
        refuse_tied_lora(adapted)
        _thaw(adapted)
        refuse_untrained(adapted)
        refuse_changed_base(adapted)
        look_at_embeddings(causal_lm(adapted))
        return adapted
    if isinstance(config, str):
        config = lora_config()
    if config is not None:
        refuse_kind(config)
    if adapted is not None:
        refuse_state(adapted)
    base = model if adapted is None else detach_adapter(adapted)
    if config is None:
        refuse_untrained(base)
        return base
    refuse_start(config, base)
    refuse_changed_base(base)
    look_at_embeddings(causal_lm(base))
    own = {id(parameter) for parameter in base.parameters()}
    # peft's prepare_model_for_kbit_training is left out on purpose: it turns embedding and head
    # into fp32 copies, which takes more memory than 4-bit saves. get_peft_model freezes the rest.
    with quiet_peft(), _base_kept(base, config):
        try:
            adapted = get_peft_model(base, config)
        except (ValueError, TypeError, ImportError) as error:
            raise ValueError(f"peft_config: {error} {_linear_layers(base)}") from error
    remember_start(adapted, own)
    try:
        refuse_tied_lora(adapted)
        refuse_untrained(adapted)
    except ValueError:
        detach_adapter(adapted)  # the caller's model, as it was
        raise
    causal_lm(adapted).__dict__[ADAPTED] = adapted
    return adapted


@contextmanager
def _base_kept(base: nn.Module, config: PeftConfig) -> Iterator[None]:
    """Put the base's weights back where attaching an adapter that changes them doesn't end well."""
    layers = dict(base.named_parameters()) if changes_base(config) else {}
    kept = {name: weight.detach().cpu().clone() for name, weight in layers.items()}
    try:
        yield
    except BaseException:
        for name, weight in kept.items():
            layers[name].data = weight.to(layers[name].device)
        raise


def _linear_layers(model: nn.Module) -> str:
    """What `target_modules` could have been, for an error."""
    named = model.named_modules()
    names = sorted({name.rpartition(".")[2] for name, m in named if isinstance(m, nn.Linear)})
    return f"The model's linear layers are called {', '.join(names[:20])}" if names else ""


def detach_adapter(model: nn.Module) -> nn.Module:
    """Take the adapter off, without merging it; the plain model that is left."""
    adapted = _adapted(model)
    base: nn.Module = model
    if adapted is not None:
        _put_originals_back(adapted)
    if adapted is not None and (start := start_of(adapted)) is not None:
        own = dict(adapted.named_parameters())
        fill(own, {name: weight for name, weight in start.items() if name in own})
        base = adapted.merge_and_unload()  # what the adapter took out of the base is put back
    elif adapted is not None:
        fill(dict(adapted.named_parameters()), own_start_of(adapted))
        base = adapted.unload()
    for name in (ADAPTED, START, EMBEDDINGS):
        vars(causal_lm(base)).pop(name, None)
    return base


def _put_originals_back(adapted: nn.Module) -> None:
    """What was trained in place of a module of the base model; peft would leave that there."""
    for name, module in list(adapted.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            parent, _, child = name.rpartition(".")
            setattr(adapted.get_submodule(parent), child, module.original_module)


def _adapted(model: nn.Module) -> PeftModel | None:
    """The PeftModel that the model is or was wrapped in, if it still carries its layers."""
    if isinstance(model, PeftModel):
        return model
    causal_lm(model)  # or it is told that it is none
    if not any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        return None
    known = model.__dict__.get(ADAPTED)
    if known is None:
        raise ValueError(
            "model: carries adapter layers but isn't a PeftModel; pass the PeftModel that "
            "get_peft_model returned, so that its adapter can go on training"
        )
    return known


def _trainable(config: PeftConfig) -> PeftConfig:
    """The config of an adapter that was loaded for inference, as one that is trained."""
    config = copy.copy(config)
    config.inference_mode = False
    return config


def _thaw(adapted: PeftModel) -> None:
    """Free the weights of an adapter that was loaded for inference, all that belong to it.

    What somebody froze in an adapter that was made for training stays frozen.
    """
    name = adapted.active_adapters[0]
    if not adapted.peft_config[name].inference_mode:
        return
    adapted.set_adapter(name)
    # The biases of the base model, where the adapter trains these, are in no layer of its own.
    tuner: Any = adapted.base_model
    tuner._mark_only_adapters_as_trainable(tuner.model)
