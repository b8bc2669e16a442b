"""Writing GGUF: a model in 16, 8 or 4 bits, or its adapter alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rmipo_lite.adapters.embeddings import plain_embedding
from rmipo_lite.export.architectures import (
    Family,
    extra_tensors,
    family_of,
    in_their_order,
    keys_of,
    longrope_scale,
)
from rmipo_lite.export.vocabulary import Vocabulary, vocabulary_of

# Format -> (llama.cpp's name of such a file, what matrices are stored in).
FORMATS = {
    "f32": ("ALL_F32", "F32"),
    "f16": ("MOSTLY_F16", "F16"),
    "bf16": ("MOSTLY_BF16", "BF16"),
    "q8_0": ("MOSTLY_Q8_0", "Q8_0"),
    "q4_k_m": ("MOSTLY_Q4_K_M", "Q4_K"),
}
_LARGEST_HALF = 65504.0
# Where a row doesn't divide into the blocks of a kind: what llama.cpp takes then.
_INSTEAD = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        path: the file.
        format: as asked for.
        fallen_back: tensors whose rows don't divide into the format's blocks, and their kinds.
    """

    path: Path
    format: str
    fallen_back: dict[str, str]


def write_model(
    model: PreTrainedModel, tokenizer: Any, path: Path, kind: str, name: str
) -> Written:
    """Write a whole model.

    Args:
        model: without an adapter, not quantised.
        tokenizer: its own.
        path: the file; what is left of one that failed is the caller's to remove.
        kind: one of `FORMATS`.
        name: what the file calls the model.

    Raises:
        ValueError: its architecture or tokenizer can't be exported, or its numbers don't fit.
        ImportError: the packages of the extra [gguf] are missing.
    """
    import gguf

    config = model.config.get_text_config()
    family = family_of(config)
    vocabulary = vocabulary_of(tokenizer, int(plain_embedding(model).weight.shape[0]))
    entries = list(_entries(model, family, config, kind))
    arch = gguf.MODEL_ARCH_NAMES[getattr(gguf.MODEL_ARCH, family.name)]
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(int(getattr(gguf.LlamaFileType, FORMATS[kind][0])))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in {**keys_of(config), **longrope_scale(config)}.items():
        getattr(writer, key)(value)
    _write_vocabulary(writer, vocabulary)
    write_tensors(writer, entries)
    return Written(path, kind, {e.name: e.stored_as for e in entries if e.stored_as != e.wanted})


@dataclass(frozen=True)
class Entry:
    """A tensor of the file.

    Attributes:
        name: llama.cpp's.
        weight: as the file has it, not yet in its kind.
        wanted, stored_as: the kind that the format asks for, and that the rows allow.
    """

    name: str
    weight: Tensor
    wanted: str
    stored_as: str


def _entries(model: PreTrainedModel, family: Family, config: Any, kind: str) -> Iterator[Entry]:
    import gguf

    names = gguf.get_tensor_name_map(
        getattr(gguf.MODEL_ARCH, family.name), config.num_hidden_layers
    )
    weights = dict(
        model.named_parameters()
    )  # a head that is tied to the embeddings isn't among them
    for name, factors in extra_tensors(config):
        yield Entry(name, factors, "F32", "F32")
    is_tied = not any(name.endswith("lm_head.weight") for name in weights)
    for name, weight in weights.items():
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if theirs is None:
            raise ValueError(f"model: llama.cpp's {family.name} has no place for {name}")
        wanted = _wanted(theirs, weight, kind, config.num_hidden_layers, is_tied)
        changed = in_their_order(family, config, name, weight.detach())
        yield Entry(theirs, changed, wanted, _possible(wanted, int(weight.shape[-1])))


def _wanted(name: str, weight: Tensor, kind: str, layers: int, is_tied: bool) -> str:
    """The kind that a format gives to a tensor; of 4 bits as llama.cpp mixes them."""
    if weight.ndim <= 1 or name.endswith("_norm.weight"):
        return "F32"
    if kind != "q4_k_m":
        return FORMATS[kind][1]
    if name == "output.weight" or (name == "token_embd.weight" and is_tied):
        return "Q6_K"
    if name.endswith("attn_qkv.weight"):
        return "Q5_K"
    if name.endswith(("attn_v.weight", "ffn_down.weight")):
        found = re.match(r"blk\.(\d+)\.", name)
        layer = int(found.group(1)) if found else 0
        eighth = layers // 8
        if layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2:
            return "Q6_K"
    return "Q4_K"


def _possible(kind: str, row: int) -> str:
    for one in (kind, _INSTEAD.get(kind, kind)):
        if row % _sizes(one)[0] == 0:
            return one
    return "F16"


def _sizes(kind: str) -> tuple[int, int]:
    """Numbers of a block, and its bytes."""
    import gguf

    sizes: tuple[int, int] = gguf.GGML_QUANT_SIZES[getattr(gguf.GGMLQuantizationType, kind)]
    return sizes


def write_tensors(writer: Any, entries: list[Entry]) -> None:
    """Everything that the writer knows, then the tensors, one of them in memory at a time."""
    from gguf import GGMLQuantizationType

    for entry in entries:
        block, size = _sizes(entry.stored_as)
        raw = getattr(GGMLQuantizationType, entry.stored_as)
        shape, numel = tuple(entry.weight.shape), entry.weight.numel()
        writer.add_tensor_info(
            entry.name, shape, np.dtype(np.float32), numel // block * size, raw_dtype=raw
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    try:
        for entry in entries:
            writer.write_tensor_data(_packed(entry))
    finally:
        writer.close()


def _packed(entry: Entry) -> Any:
    """The tensor's bytes.

    Raises:
        ValueError: it has numbers that are none, or none of float16's.
    """
    from gguf import GGMLQuantizationType, quants

    numbers = entry.weight.detach().to("cpu", torch.float32).contiguous()
    largest = float(numbers.abs().max()) if numbers.numel() else 0.0
    if not largest < float("inf"):
        raise ValueError(f"model: {entry.name} holds NaN or inf")
    if entry.stored_as == "F16" and largest > _LARGEST_HALF:
        raise ValueError(
            f"format: {entry.name} has numbers up to {largest:.3g}, and float16 ends at 65,504; "
            "take 'bf16' or 'f32'"
        )
    array, kind = numbers.numpy(), getattr(GGMLQuantizationType, entry.stored_as)
    if entry.stored_as.endswith("_K"):
        import libgguf

        return np.asarray(libgguf.quantize_rows(array, int(kind)))
    return quants.quantize(array, kind)


def _write_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    for key, value in vocabulary.special.items():
        getattr(writer, key)(value)
    if vocabulary.template:
        writer.add_chat_template(vocabulary.template)
