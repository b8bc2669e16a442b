"""The base model's own files, where these are at hand: what an adapter will be loaded onto.

An adapter is saved for the model that its config names. What is in that model and not in those
files, such as a merged adapter, would be missing when somebody loads the two together.
"""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from rmipo_lite.adapters.base_model import packed_weights

_OF_PEFT = ("original_module", "base_layer", "token_adapter")
_ROUNDING = 1e-6  # an adapter that took a part out of the base was put back in float32
_INDEX, _WEIGHTS = "model.safetensors.index.json", "model.safetensors"


def file_name(name: str) -> str:
    """What a parameter is called in files, whatever an adapter has put around its layer."""
    return ".".join(part for part in name.split(".") if part not in _OF_PEFT)


def stored(base: PreTrainedModel, name: str, rows: int | None = None) -> Tensor | None:
    """A tensor of the base model's files, or its first rows; None where these aren't at hand.

    `name` as `file_name` gives it; older files leave the inner model's name out.
    """
    keys = (name, name.removeprefix(f"{base.base_model_prefix}."))
    try:
        for key in keys:
            file = _file_of(str(base.name_or_path), key)
            if file is None:
                continue
            with safe_open(file, "pt") as tensors:
                if key in tensors.keys():  # noqa: SIM118
                    part: Tensor = tensors.get_slice(key)[:rows]
                    return part
    except (OSError, ValueError, KeyError):
        return None
    return None


def _file_of(name: str, key: str) -> Path | None:
    if whole := _local(name, _WEIGHTS):
        return whole
    index = _local(name, _INDEX)
    if index is None:
        return None
    shard = json.loads(index.read_text(encoding="utf-8"))["weight_map"].get(key)
    return None if shard is None else _local(name, Path(shard).name)


def _local(name: str, file: str) -> Path | None:
    """A file of a model's folder, or of a hub's cache; nothing is downloaded."""
    if Path(name).is_dir():
        path = Path(name) / file
        return path if path.is_file() else None
    try:
        found = cached_file(name, file, local_files_only=True)
    except (OSError, ValueError):
        return None
    return None if found is None else Path(found)


def equal(weight: Tensor, there: Tensor, tolerance: float = 0.0) -> bool:
    """Whether a weight is what loading gives, in its precision or by way of a lower one.

    `tolerance` is a share of the largest value.
    """
    own = weight.detach().cpu()
    atol = tolerance * float(there.float().abs().max()) if there.numel() else 0.0
    return own.shape == there.shape and any(
        torch.allclose(own, there.to(lower).to(own.dtype), rtol=0.0, atol=atol)
        for lower in (own.dtype, torch.bfloat16, torch.float16)
    )


def changed_weight(base: PreTrainedModel) -> str | None:
    """A frozen matrix of the model that isn't its files' own, by name; None where all are.

    Looked at is the first row of each; embeddings, which are saved with an adapter, aren't.
    """
    if not base.name_or_path:
        return None
    ends = {
        id(parameter)
        for end in (base.get_input_embeddings(), base.get_output_embeddings())
        if end is not None
        for parameter in end.parameters()
    } | packed_weights(base)
    for name, weight in base.named_parameters():  # an adapter's own are in no such file
        if weight.ndim > 1 and weight.is_floating_point() and id(weight) not in ends:
            there = stored(base, file_name(name), rows=1)
            if there is not None and not equal(weight[:1], there, _ROUNDING):
                return file_name(name)
    return None
