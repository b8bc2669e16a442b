"""Adapters that can't be trained here, or not saved as they are: refused by name, before anything.

What is allowed trains whole, and what is saved gives the same logits again in plain peft.
"""

from collections.abc import Iterator

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from rmipo_lite.adapters.base_files import changed_weight
from rmipo_lite.adapters.base_model import causal_lm
from rmipo_lite.adapters.saved import adapter_state
from rmipo_lite.adapters.start import changes_base, start_of

_INSTEAD = "LoRA, DoRA, IA3, LoHa, LoKr, OFT and VeRA are among those that can be trained"
# peft's type -> why; those that learn a prompt are told by peft itself.
_REFUSED = {
    "ADAPTION_PROMPT": "it replaces the attention that packed pairs need",
    "ADALORA": "its ranks change between steps, by a loss of its own",
    "POLY": "it wants a task for every row",
    "MULTITASK_PROMPT_TUNING": "it wants a task for every row",
    "XLORA": "it mixes adapters by a pass of its own",
}


def refuse_kind(config: PeftConfig) -> None:
    """Raise ValueError for a config whose adapter can't be trained or saved exactly."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    why = _REFUSED.get(kind)
    if config.is_prompt_learning:
        why = "it puts learnt tokens before every text, and packed pairs have no place for them"
    start = getattr(config, "init_lora_weights", None)
    if start == "loftq":
        why = (
            "LoftQ leaves a base model that nobody can load again; quantization='4bit' with "
            "ordinary LoRA takes the same memory"
        )
    if changes_base(config) and getattr(config, "use_dora", False):
        why = f"DoRA can't be saved apart from the base that init_lora_weights={start!r} changes"
    if getattr(config, "layer_replication", None):
        why = "it repeats layers of the model, which can't be taken back or merged"
    if getattr(config, "alora_invocation_tokens", None):
        why = "it is active from certain tokens on, which packed pairs don't know"
    if config.inference_mode:
        why = "inference_mode=True makes an adapter that can't be trained; leave it out"
    if why is not None:
        raise ValueError(f"peft_config: {type(config).__name__} ({kind}): {why}. {_INSTEAD}")


def refuse_start(config: PeftConfig, base: nn.Module) -> None:
    """Raise ValueError for a start that this base can't be given, or not exactly."""
    start = getattr(config, "init_lora_weights", None)
    if start in ("eva", "lora_ga"):
        raise ValueError(
            f"peft_config: init_lora_weights={start!r} needs a pass over data first, and without "
            "it is ordinary LoRA; make the PeftModel with peft (initialize_lora_eva_weights) and "
            "pass that, or leave it out"
        )
    kinds = {p.dtype for p in base.parameters() if p.ndim > 1} & {torch.bfloat16, torch.float16}
    if changes_base(config) and kinds:
        raise ValueError(
            f"peft_config: init_lora_weights={start!r} takes a part out of the weights, and what "
            f"is left is rounded in {kinds.pop()}: neither the base nor a saved adapter would be "
            "exact. Load the model in float32, or leave it out"
        )


def refuse_changed_base(model: nn.Module) -> None:
    """Raise ValueError where an adapter would be saved for a base that is in no file."""
    base = causal_lm(model)
    name = None if start_of(model) is not None else changed_weight(base)
    if name is not None:
        raise ValueError(
            f"model: its weights ({name}) aren't those of {base.name_or_path}, which it was loaded "
            "from, and an adapter saved here would be loaded onto those. Save this model by "
            "model.save_pretrained(folder) and train that folder, or train it in full "
            "(peft_config=None)"
        )


def refuse_state(model: PeftModel) -> None:
    """Raise ValueError for a PeftModel whose adapters are in no state to be trained."""
    active = model.active_adapters
    if len(active) != 1:
        raise ValueError(
            f"model: {len(active)} adapters are active ({', '.join(active)}), and one is trained "
            "and saved; choose it by model.set_adapter(name)"
        )
    for name, layer in _layers(model):
        if layer.merged:
            raise ValueError(
                f"model: {', '.join(layer.merged_adapters)} is merged into the weights ({name}), "
                "where it learns nothing; model.unmerge_adapter() takes it out again"
            )
        if layer.disable_adapters:
            raise ValueError(
                f"model: its adapters are switched off ({name}); model.enable_adapter_layers()"
            )
    if changes_base(model.active_peft_config) and start_of(model) is None:
        start = model.active_peft_config.init_lora_weights
        raise ValueError(
            f"model: its adapter began as {start!r}, which took a part out of the base model, and "
            "from what it started nobody knows here; save it converted by peft "
            "(path_initial_model_for_weight_conversion) and go on from that, or pass the base "
            "model and the config as peft_config"
        )


def refuse_untrained(model: nn.Module) -> None:
    """Raise ValueError where nothing is trained, saying why, or more than is saved."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not isinstance(model, PeftModel):
        if not trained:
            raise ValueError(
                "model: every weight is frozen (requires_grad is False), and peft_config=None "
                "trains what the model has; model.requires_grad_(True), or peft_config='auto'"
            )
        return
    name = model.active_adapters[0]
    if not trained:
        raise ValueError(
            f"model: every weight of its adapter {name!r} is frozen (requires_grad is False); "
            f"model.set_adapter({name!r}) frees them"
        )
    places = {tensor.data_ptr() for tensor in adapter_state(model).values()}
    unsaved = [key for key, weight in trained.items() if weight.data_ptr() not in places]
    if unsaved:
        raise ValueError(
            f"model: {len(unsaved)} weights would be trained and not saved with the adapter "
            f"{name!r}, the first is {unsaved[0]}; freeze them, or name their module in the "
            "adapter's modules_to_save"
        )


def _layers(model: nn.Module) -> Iterator[tuple[str, BaseTunerLayer]]:
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


def refuse_tied_lora(model: PeftModel) -> None:
    """LoRA on one of two tied weights: a merge would change the other as well.

    peft warns, and with `ensure_weight_tying` too the merged model has other logits (measured with
    peft 0.21: up to a quarter of the largest).
    """
    base = causal_lm(model)
    ends = base.get_input_embeddings(), base.get_output_embeddings()
    plain = [end.get_base_layer() if isinstance(end, BaseTunerLayer) else end for end in ends]
    adapted = [end for end in ends if isinstance(end, LoraLayer)]
    if not adapted or None in plain or plain[0].weight is not plain[1].weight:
        return
    names = [name for name, module in base.named_modules() if any(module is a for a in adapted)]
    raise ValueError(
        f"peft_config: LoRA on {' and '.join(names)}, but embedding and head are tied, so that "
        "merging would change both; leave it out of target_modules, or name it in modules_to_save"
    )
