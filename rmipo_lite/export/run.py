"""One export: write, check, say what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from rmipo_lite.adapters.base_model import causal_lm, packed_weights
from rmipo_lite.adapters.merge import merged_copy
from rmipo_lite.adapters.start import swapped
from rmipo_lite.export import check as checking
from rmipo_lite.export.adapter_file import write_adapter
from rmipo_lite.export.gguf_file import FORMATS, Written, write_model
from rmipo_lite.export.modelfile import modelfile_of
from rmipo_lite.model.names import name_of, short_name
from rmipo_lite.output.console import say, size
from rmipo_lite.parallel.sharded import is_sharded
from rmipo_lite.system.files import file_put_in_place

_MISSING = "pip install 'rmipo_lite[gguf]'"


def export(
    model: nn.Module,
    tokenizer: Any,
    path: str | Path,
    kind: str,
    prompts: Sequence[list[int]],
    *,
    adapter_only: bool = False,
    modelfile: bool = False,
    check: bool = True,
) -> Path:
    """Write a model, its adapter merged in, or the adapter alone, as a GGUF file.

    Args:
        model, tokenizer: as they were trained; both stay as they are.
        path: the new file.
        kind: the format, one of `FORMATS`; of an adapter alone, float32 in any case.
        prompts: ids of texts at whose places the file is compared with the model.
        adapter_only: write the adapter for use upon a file of the base model.
        modelfile: write Ollama's Modelfile beside it.
        check: lay the file beside the model in llama.cpp, where that is installed.

    Returns:
        The file.

    Raises:
        ValueError: a format that isn't one, a model or tokenizer that can't be exported, or a file
            that isn't the model in llama.cpp, which then isn't left behind.
        FileExistsError: there is such a file.
        ImportError: packages of the extra [gguf] are missing.
    """
    target = Path(path)
    if kind not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {kind!r}")
    beside = target.with_name("Modelfile")
    for file in (target, *([beside] if modelfile else [])):
        if file.exists():
            raise FileExistsError(f"path: {file} is there already; name a new file")
    adapted = model if isinstance(model, PeftModel) else None
    if adapter_only and adapted is None:
        raise ValueError("adapter_only: this model has no adapter")
    if adapter_only and modelfile:
        raise ValueError(
            "modelfile: that of an adapter alone would have to name a file of its base model, "
            "which isn't written here; export the whole model"
        )
    if is_sharded(model):
        raise ValueError(
            "model: its layers are shared out among processes (FSDP2), each has a part of them; "
            "export the saved folder in one process: rmipo-lite export RUN FILE"
        )
    try:
        import gguf  # noqa: F401, what is missing is said before minutes of merging
        import libgguf  # noqa: F401
    except ImportError as error:
        raise ImportError(f"export needs packages of its own: {_MISSING} ({error})") from error
    # A template that can't be said is known before anything is written.
    text = modelfile_of(tokenizer, target) if modelfile else None
    name = short_name(name_of(model) or target.stem)
    with file_put_in_place(target) as staged:
        if adapter_only and adapted is not None:
            written = write_adapter(adapted, staged, name)
            _check_adapter(adapted, tokenizer, staged, prompts, check)
        else:
            written = write_model(_whole(model), tokenizer, staged, kind, name)
            _check(model, tokenizer, written, prompts, check)
    _tell(target, written)
    if text is not None:
        beside.write_text(text, encoding="utf-8")
        say(f"Modelfile: {beside} (ollama create NAME -f {beside}; not tried with Ollama itself)")
    return target


def _whole(model: nn.Module) -> PreTrainedModel:
    base = causal_lm(model)
    if isinstance(model, PeftModel):
        # As exact as it is in memory: what the base's files are in would be one rounding more.
        return merged_copy(model, None if packed_weights(base) else base.dtype)
    if packed_weights(base):
        raise ValueError(
            "model: its weights are in 4 bits; load it with quantization='none' to export it"
        )
    return base


def _check(
    model: nn.Module, tokenizer: Any, written: Written, prompts: Sequence[list[int]], wanted: bool
) -> None:
    if not wanted:
        return
    if not checking.is_available():
        say(f"Not checked in llama.cpp, which isn't here: {_MISSING}")
        return
    say(f"Checked: {checking.check(model, tokenizer, written.path, written.format, prompts)}")


def _check_adapter(
    model: PeftModel, tokenizer: Any, path: Path, prompts: Sequence[list[int]], wanted: bool
) -> None:
    """Upon a file of the base model that is made for it and thrown away."""
    if not wanted or not checking.is_available():
        _check(model, tokenizer, Written(path, "f32", {}), prompts, wanted)
        return
    import tempfile

    with tempfile.TemporaryDirectory(prefix="rmipo-lite-", ignore_cleanup_errors=True) as folder:
        base = Path(folder) / "base.gguf"
        nothing = {n: torch.zeros_like(p) for n, p in model.named_parameters() if ".lora_B." in n}
        with swapped(model, nothing):
            write_model(merged_copy(model), tokenizer, base, "f32", "base")
        found = checking.check(model, tokenizer, base, "f32", prompts, path)
    say(f"Checked upon its base model: {found}")


def _tell(path: Path, written: Written) -> None:
    say(f"GGUF: {path}, {written.format}, {size(path.stat().st_size)}")
    if written.fallen_back:
        kinds = ", ".join(sorted({kind.lower() for kind in written.fallen_back.values()}))
        say(
            f"{len(written.fallen_back)} tensors are in {kinds}: their rows don't divide into the "
            f"blocks of {written.format}"
        )
