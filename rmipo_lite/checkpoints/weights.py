"""Weights of a run on disk: saved as safetensors, loaded strictly, the options beside them."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from rmipo_lite.checkpoints.sealed_folder import CheckpointError
from rmipo_lite.output.redaction import redact

ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "training_config.json"


def non_finite_weight(model: nn.Module, trained_only: bool = False) -> str | None:
    """The name of the first weight that holds NaN or inf, None where all are numbers."""
    for name, parameter in model.named_parameters():
        if trained_only and not parameter.requires_grad:
            continue
        if parameter.is_floating_point() and parameter.numel() and not _is_finite(parameter):
            return name
    return None


def _is_finite(weight: torch.Tensor) -> bool:
    # Not isfinite().all(): its intermediate results take more memory than a large head itself.
    return bool(torch.stack(weight.detach().aminmax()).isfinite().all())  # NaN is in both


def save_run(model: Any, tokenizer: Any, args: Any, folder: Path, state_dict: Any = None) -> None:
    """Save weights, tokenizer and options as loose files of `folder`."""
    save_weights(model, folder, state_dict)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    write_training_config(args, folder)


def save_weights(model: Any, folder: Path, state_dict: Any = None) -> None:
    """Save the adapter of a PeftModel, or all weights of a PreTrainedModel, as safetensors.

    Raises TypeError for any other module, which doesn't know how to save itself.
    """
    if isinstance(model, PeftModel):
        # "auto" would ask the hub at every save whether the vocabulary was resized
        model.save_pretrained(str(folder), state_dict=state_dict, save_embedding_layers=False)
    elif isinstance(model, PreTrainedModel):
        model.save_pretrained(folder, state_dict=state_dict)
    else:
        raise TypeError(
            f"model: wanted a PeftModel or a PreTrainedModel, got {type(model).__name__}"
        )


def write_training_config(args: Any, folder: Path) -> None:
    """Write the run's options to `folder/training_config.json`, secrets redacted."""
    content = redact(args.to_dict())
    text = json.dumps(content, indent=2, sort_keys=True, default=str)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def require_adapter_weights(model: PeftModel, folder: Path) -> None:
    """Refuse an adapter's folder that lacks weights of the adapter that its config describes.

    peft starts them anew, and an adapter that loads and does nothing looks like training that had
    no effect.

    Raises:
        ValueError: names the first of them.
    """
    with safe_open(folder / ADAPTER_FILE, "pt") as file:
        found = set(file.keys())
    own = _own_weights(model)
    missing = sorted(set(own) - found)
    if missing:
        raise ValueError(
            f"adapter: {folder / ADAPTER_FILE} lacks {len(missing)} of {len(own)} weights; the "
            f"first is {missing[0]}. Is it whole, and is its base the model it was trained on?"
        )


def load_adapter_weights(model: PeftModel, folder: Path) -> None:
    """Load `adapter_model.safetensors` into the active adapter, strictly.

    peft ignores keys that are missing or unknown; here they are an error that names them, since an
    adapter that loads and does nothing looks like training that had no effect.
    """
    path = folder / ADAPTER_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder.name}/{ADAPTER_FILE} is missing")
    weights = load_file(path)
    own = _own_weights(model)
    missing, unknown = sorted(set(own) - set(weights)), sorted(set(weights) - set(own))
    wrong = [k for k in own.keys() & weights.keys() if own[k].shape != weights[k].shape]
    if missing or unknown or wrong:
        raise CheckpointError(
            f"{folder.name}/{ADAPTER_FILE} belongs to another adapter: {len(missing)} weights "
            f"missing, {len(unknown)} unknown, {len(wrong)} of another shape; the first is "
            f"{[*missing, *unknown, *sorted(wrong)][0]}. Use the LoRA settings it was saved with"
        )
    set_peft_model_state_dict(model, weights, adapter_name=model.active_adapters[0])


def _own_weights(model: PeftModel) -> dict[str, Tensor]:
    """The active adapter's weights under the names that files have."""
    weights: dict[str, Tensor] = get_peft_model_state_dict(
        model, adapter_name=model.active_adapters[0], save_embedding_layers=False
    )
    return weights
