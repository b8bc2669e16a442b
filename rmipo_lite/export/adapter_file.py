"""Writing GGUF of an adapter alone: what llama.cpp adds to a file of the base model (`--lora`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor

from rmipo_lite.adapters.base_model import causal_lm
from rmipo_lite.adapters.embeddings import embeddings_are_own
from rmipo_lite.adapters.start import changes_base
from rmipo_lite.export.architectures import Family, family_of, in_their_order
from rmipo_lite.export.gguf_file import Entry, Written, write_tensors

_WHOLE = "export the whole model instead"


def write_adapter(model: PeftModel, path: Path, name: str) -> Written:
    """Write the active adapter; what is left of a file that failed is the caller's to remove.

    Raises:
        ValueError: it isn't plain LoRA on a family that can be exported; the message says why.
        ImportError: the packages of the extra [gguf] are missing.
    """
    import gguf

    base = causal_lm(model)
    config = base.config.get_text_config()
    family = family_of(config)
    _refuse_more_than_lora(model)
    entries = list(_entries(base, family, config))
    arch = gguf.MODEL_ARCH_NAMES[getattr(gguf.MODEL_ARCH, family.name)]
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    # 0: as it is. Its scale is in B already, since layers may have scales of their own.
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)
    write_tensors(writer, entries)
    return Written(path, "f32", {})


def _refuse_more_than_lora(model: PeftModel) -> None:
    config: Any = model.active_peft_config
    wrong = None
    if str(config.peft_type).rpartition(".")[2] != "LORA":
        wrong = f"an adapter of kind {config.peft_type}"
    elif getattr(config, "use_dora", False):
        wrong = "DoRA"
    elif getattr(config, "lora_bias", False) or config.bias != "none":
        wrong = "an adapter with biases"
    elif changes_base(config):
        wrong = f"an adapter that starts as {config.init_lora_weights!r}"
    elif len(model.active_adapters) != 1:
        wrong = f"several adapters at once ({', '.join(model.active_adapters)})"
    elif any(layer.merged for layer in model.modules() if isinstance(layer, LoraLayer)):
        wrong = "one that is merged into its base already (merge_adapter; unmerge_adapter first)"
    elif embeddings_are_own(causal_lm(model)) or any(
        isinstance(module, ModulesToSaveWrapper) for module in model.modules()
    ):
        wrong = "an adapter that trains whole layers beside LoRA"
    if wrong is not None:
        raise ValueError(f"adapter: a LoRA file of llama.cpp can't say {wrong}; {_WHOLE}")


def _entries(base: Any, family: Family, config: Any) -> Iterator[Entry]:
    import gguf

    names = gguf.get_tensor_name_map(
        getattr(gguf.MODEL_ARCH, family.name), config.num_hidden_layers
    )
    head = base.get_output_embeddings()
    is_tied = bool(getattr(config, "tie_word_embeddings", False))
    layers = [(n, layer) for n, layer in base.named_modules() if isinstance(layer, LoraLayer)]
    for place, layer in layers:
        if layer is head and is_tied:  # there is no such tensor in a file of the base
            raise ValueError(f"adapter: it has LoRA on a head that is the embeddings; {_WHOLE}")
        for adapter in layer.active_adapters:
            if adapter in layer.lora_embedding_A:
                raise ValueError(f"adapter: it has LoRA on the embeddings ({place}); {_WHOLE}")
            if adapter not in layer.lora_A:
                continue
            theirs = names.get_name(f"{place}.weight", try_suffixes=(".weight",))
            if theirs is None:
                raise ValueError(f"model: llama.cpp's {family.name} has no place for {place}")
            a = cast(Tensor, layer.lora_A[adapter].weight).detach()
            b = layer.scaling[adapter] * cast(Tensor, layer.lora_B[adapter].weight).detach().float()
            b = in_their_order(family, config, f"{place}.weight", b)
            yield _entry(f"{theirs}.lora_a", a)
            yield _entry(f"{theirs}.lora_b", b)


def _entry(name: str, weight: Tensor) -> Entry:
    return Entry(name, weight.to(torch.float32), "F32", "F32")
