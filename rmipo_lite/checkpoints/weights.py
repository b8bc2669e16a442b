"""Weights of a run on disk: saved as safetensors, loaded strictly, the options beside them."""

import json
import tempfile
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from rmipo_lite.adapters.base_model import causal_lm, packed_weights
from rmipo_lite.adapters.saved import save_adapter
from rmipo_lite.output.console import watched_bars
from rmipo_lite.output.redaction import redact
from rmipo_lite.parallel.sharded import local

CONFIG_FILE = "training_config.json"
_SAMPLE = 512  # values of each weight that a fingerprint is made of


def non_finite_weight(model: nn.Module, trained_only: bool = False) -> str | None:
    """The name of the first weight that holds NaN or inf, None where all are numbers."""
    packed = packed_weights(model)
    for name, parameter in model.named_parameters():
        if (trained_only and not parameter.requires_grad) or id(parameter) in packed:
            continue
        if parameter.is_floating_point() and parameter.numel() and not _is_finite(parameter):
            return name
    return None


def fingerprint(weights: Iterable[tuple[str, torch.Tensor]]) -> str:
    """A hash of names, shapes and some values of every weight.

    Training changes them all, and to read all of an 8B model would take a minute.
    """
    found = sha256()
    for name, weight in weights:
        flat = weight.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // _SAMPLE)].contiguous().cpu()
        found.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        found.update(some.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _is_finite(weight: torch.Tensor) -> bool:
    own = local(weight.detach())
    # Not isfinite().all(): its intermediate results take more memory than a large head itself.
    return not own.numel() or bool(torch.stack(own.aminmax()).isfinite().all())  # NaN is in both


def rehearse_save(model: Any, tokenizer: Any, args: Any) -> None:
    """Save once what a run will save, and throw it away: what can't be saved is known before.

    All of it but the weights of a model that is trained in full.

    Raises:
        ValueError: what refuses to be saved, and why; OSError is left as it is.
    """
    with tempfile.TemporaryDirectory(prefix="rmipo-lite-", ignore_cleanup_errors=True) as folder:
        try:
            if isinstance(model, PeftModel):
                save_weights(model, Path(folder))
            else:
                model.config.save_pretrained(folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            causal_lm(model).generation_config.save_pretrained(folder)
            write_training_config(args, Path(folder))
        except OSError:
            raise
        except Exception as error:  # of several packages
            raise ValueError(
                f"this run's result could not be saved ({type(error).__name__}: {error}); nothing "
                "has been trained yet"
            ) from error


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
        save_adapter(model, folder, state_dict)
        # peft saves none, and what an answer ends with belongs to what was learnt
        causal_lm(model).generation_config.save_pretrained(folder)
    elif isinstance(model, PreTrainedModel):
        with watched_bars():
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
