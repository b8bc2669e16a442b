"""An adapter's files: written as peft writes them, read strictly, embeddings beside it if changed.

Whatever its name in the model, the active adapter's files lie in the folder itself, where peft,
transformers and everybody else look for them.
"""

import shutil
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.other import ModulesToSaveWrapper
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rmipo_lite.adapters.base_model import causal_lm
from rmipo_lite.adapters.embeddings import embeddings_are_own, name_in, plain
from rmipo_lite.adapters.start import (
    Weights,
    as_difference,
    difference_config,
    of_difference,
    rebase,
    start_of,
    swapped,
)

ADAPTER_FILE = "adapter_model.safetensors"


class AdapterError(ValueError):
    """An adapter's file that isn't that of the model's adapter; the message says what of it."""


def adapter_state(model: PeftModel, state_dict: Any = None) -> Weights:
    """The active adapter's weights under the names that files have."""
    state: Weights = get_peft_model_state_dict(
        model,
        state_dict=state_dict,
        adapter_name=model.active_adapters[0],
        save_embedding_layers=embeddings_are_own(causal_lm(model)),
    )
    if embeddings_are_own(causal_lm(model)):
        state |= _ends_left_out(model, state)
    return state


def _ends_left_out(model: PeftModel, state: Weights) -> Weights:
    """Where one of embedding and head has an adapter, peft saves that one alone."""
    base = causal_lm(model)
    ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    if any(end is None or isinstance(end, ModulesToSaveWrapper) for end in ends):
        return {}
    found = {plain(end).weight: name_in(base, plain(end)) for end in ends}  # tied ones: one
    named = {f"base_model.model.{name}.weight": weight for weight, name in found.items()}
    return {key: weight.detach() for key, weight in named.items() if key not in state}


def save_adapter(model: PeftModel, folder: Path, state_dict: Any = None) -> None:
    """Save the active adapter, and what of the base model isn't the base's any more."""
    name = model.active_adapters[0]
    model.save_pretrained(
        str(folder),
        state_dict=state_dict,
        selected_adapters=[name],
        # "auto" would ask the hub at every save whether the vocabulary was resized
        save_embedding_layers=embeddings_are_own(causal_lm(model)),
    )
    if name != "default":  # peft puts it into a folder of its name, where only it itself looks
        for path in (folder / name).iterdir():
            shutil.move(path, folder / path.name)
        (folder / name).rmdir()
    start, state = start_of(model), adapter_state(model, state_dict)
    if start is not None:
        state = as_difference(state, _named_as_in_files(model, start))
    if start is not None or embeddings_are_own(causal_lm(model)):
        tensors = {key: tensor.clone().contiguous() for key, tensor in state.items()}
        save_file(tensors, folder / ADAPTER_FILE, metadata={"format": "pt"})
    if start is not None:
        config = difference_config(model.peft_config[name])
        config.inference_mode = True
        config.save_pretrained(str(folder))


def _named_as_in_files(model: PeftModel, weights: Weights) -> Weights:
    with swapped(model, weights):
        return {key: tensor.clone() for key, tensor in adapter_state(model).items()}


def resize_for(base: Any, folder: Path) -> None:
    """Give the base model the vocabulary of embeddings that were saved with an adapter."""
    embedding = base.get_input_embeddings()
    name = next(name for name, module in base.named_modules() if module is embedding)
    with safe_open(folder / ADAPTER_FILE, "pt") as file:
        prefix = f"base_model.model.{name}."  # what an adapter on it puts behind that: base_layer
        keys = [k for k in file.keys() if k.startswith(prefix)]  # noqa: SIM118
        whole = [k for k in keys if k == f"{prefix}weight" or k.endswith("base_layer.weight")]
        rows = file.get_slice(whole[0]).get_shape()[0] if whole else embedding.weight.shape[0]
        if rows != embedding.weight.shape[0]:
            base.resize_token_embeddings(rows, mean_resizing=False)


def require_adapter_weights(model: PeftModel, folder: Path) -> None:
    """Refuse an adapter's folder that lacks weights of the adapter that its config describes.

    peft starts them anew, and an adapter that loads and does nothing looks like training that had
    no effect.

    Raises:
        ValueError: names the first of them.
    """
    with safe_open(folder / ADAPTER_FILE, "pt") as file:
        found = set(file.keys())
    own = adapter_state(model)
    missing = sorted(set(own) - found)
    if missing:
        raise ValueError(
            f"adapter: {folder / ADAPTER_FILE} lacks {len(missing)} of {len(own)} weights; the "
            f"first is {missing[0]}. Is it whole, and is its base the model it was trained on?"
        )


def load_adapter_weights(model: PeftModel, folder: Path) -> None:
    """Load `adapter_model.safetensors` into the active adapter, strictly.

    peft ignores keys that are missing or unknown; here they are an error that names them.

    Raises:
        AdapterError: there is no such file, or it is another adapter's.
    """
    path = folder / ADAPTER_FILE
    if not path.is_file():
        raise AdapterError(f"{ADAPTER_FILE} is missing")
    weights: Weights = load_file(path)
    own = adapter_state(model)
    start = start_of(model)
    if start is not None:
        weights = _onto_its_start(model, weights, own, start)
    missing, unknown = sorted(set(own) - set(weights)), sorted(set(weights) - set(own))
    wrong = [k for k in own.keys() & weights.keys() if own[k].shape != weights[k].shape]
    if missing or unknown or wrong:
        raise AdapterError(
            f"{ADAPTER_FILE} belongs to another adapter: {len(missing)} weights missing, "
            f"{len(unknown)} unknown, {len(wrong)} of another shape; the first is "
            f"{[*missing, *unknown, *sorted(wrong)][0]}. Use the LoRA settings it was saved with"
        )
    set_peft_model_state_dict(model, weights, adapter_name=model.active_adapters[0])


def _onto_its_start(model: PeftModel, joined: Weights, own: Weights, start: Weights) -> Weights:
    """The trained weights of a saved difference; the model gets the start that goes with them."""
    try:
        weights, first = of_difference(joined, own)
    except (KeyError, RuntimeError) as error:
        raise AdapterError(f"{ADAPTER_FILE} belongs to another adapter ({error})") from error
    set_peft_model_state_dict(model, {**weights, **first}, adapter_name=model.active_adapters[0])
    found = dict(model.named_parameters())
    names = [name for name in start if ".lora_" in name]
    rebase(model, {name: found[name].detach().clone() for name in names})
    return weights
