"""LoRA on a model: attached once, gone on with, taken off; never nested."""

import warnings

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from rmipo_lite.model.backbone import causal_lm

# Where the model itself remembers its PeftModel, so that a second train() on the same object goes
# on with that adapter. In __dict__: nn.Module would register it as a child of itself.
ADAPTED = "_rmipo_lite_adapted"


def default_lora() -> LoraConfig:
    """LoRA on every linear layer but the head: r=16, alpha=32, no dropout."""
    return LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def attach_adapter(model: nn.Module, peft_config: LoraConfig | str | None) -> nn.Module:
    """Give the model its adapter, or leave it the one it has. Never nests.

    Args:
        model: a PreTrainedModel or a PeftModel.
        peft_config: "auto" goes on with the adapter the model carries, else attaches
            `default_lora()`; "new" removes what it carries and attaches a fresh default one; a
            LoraConfig likewise, with that configuration; None attaches nothing (an adapter goes
            on, a plain model is trained in full).

    Raises:
        ValueError: the model carries adapter layers that belong to no known PeftModel, or the
            argument is none of the above, fits no layer of the model or puts LoRA on tied
            embeddings or head.
    """
    known = (
        peft_config in ("auto", "new")
        if isinstance(peft_config, str)
        else (peft_config is None or isinstance(peft_config, PeftConfig))
    )
    if not known:
        shown = repr(peft_config)[:80]
        raise ValueError(f"peft_config must be 'auto', 'new', None or a peft config, got {shown}")
    adapted = _adapted(model)
    if adapted is not None and (peft_config is None or peft_config == "auto"):
        _refuse_tied_lora(adapted)
        _make_trainable(adapted)
        return adapted
    base = model if adapted is None else detach_adapter(adapted)
    if peft_config is None:
        return base
    config = default_lora() if isinstance(peft_config, str) else peft_config
    # peft's prepare_model_for_kbit_training is left out on purpose: it turns embedding and head
    # into fp32 copies, which takes more memory than 4-bit saves. get_peft_model freezes the rest.
    with warnings.catch_warnings():
        # peft asks for transformers' former name of activation checkpointing
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        # and says which way round gpt2 keeps its weights, which it then sees to itself
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False")
        try:
            adapted = get_peft_model(base, config)
        except ValueError as error:
            raise ValueError(f"peft_config: {error} {_linear_layers(base)}") from error
    try:
        _refuse_tied_lora(adapted)
    except ValueError:
        adapted.unload()  # the caller's model, as it was
        raise
    causal_lm(adapted).__dict__[ADAPTED] = adapted
    return adapted


def _linear_layers(model: nn.Module) -> str:
    """What `target_modules` could have been, for an error."""
    named = model.named_modules()
    names = sorted({name.rpartition(".")[2] for name, m in named if isinstance(m, nn.Linear)})
    return f"The model's linear layers are called {', '.join(names[:20])}" if names else ""


def _refuse_tied_lora(model: PeftModel) -> None:
    """LoRA on one of two tied weights: a merge would change the other as well.

    peft warns, and with `ensure_weight_tying` too the merged model has other logits (measured with
    peft 0.21: up to a quarter of the largest).
    """
    base = causal_lm(model)
    ends = base.get_input_embeddings(), base.get_output_embeddings()
    plain = [end.get_base_layer() if isinstance(end, BaseTunerLayer) else end for end in ends]
    adapted = [end for end in ends if isinstance(end, BaseTunerLayer)]
    if not adapted or None in plain or plain[0].weight is not plain[1].weight:
        return
    names = [name for name, module in base.named_modules() if any(module is a for a in adapted)]
    raise ValueError(
        f"peft_config: LoRA on {' and '.join(names)}, but embedding and head are tied, so that "
        "merging would change both; leave it out of target_modules, or name it in modules_to_save"
    )


def detach_adapter(model: nn.Module) -> nn.Module:
    """Take the adapter off, without merging it; the plain model that is left."""
    adapted = _adapted(model)
    base: nn.Module = model if adapted is None else adapted.unload()
    vars(causal_lm(base)).pop(ADAPTED, None)
    return base


def _adapted(model: nn.Module) -> PeftModel | None:
    """The PeftModel that the model is or was wrapped in, if it still carries its layers."""
    if isinstance(model, PeftModel):
        return model
    if not any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        return None
    known = model.__dict__.get(ADAPTED)
    if known is None:
        raise ValueError(
            "model: carries adapter layers but isn't a PeftModel; pass the PeftModel that "
            "get_peft_model returned, so that its adapter can go on training"
        )
    return known


def _make_trainable(adapted: PeftModel) -> None:
    """Adapters loaded for inference are frozen; training goes on with the active one."""
    active = set(adapted.active_adapters)
    for name, parameter in adapted.named_parameters():
        parts = name.split(".")
        if any(part.startswith("lora_") for part in parts) and active & set(parts):
            parameter.requires_grad_(True)
