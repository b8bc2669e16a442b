"""From a name or folder to a model that can be trained: precision, 4-bit weights, LoRA.

Nothing that comes with a model is run, neither pickles nor code (`model_files`). Weights load in
the precision they are computed in, never silently in fp32; adapter weights are fp32. An adapter is
attached once: a model that already carries one goes on with it.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerBase,
)

from rmipo_lite.adapter_files import require_adapter_weights
from rmipo_lite.config import RMiPOConfig
from rmipo_lite.device_memory import free_bytes
from rmipo_lite.display import in_notebook, in_terminal
from rmipo_lite.footprint import Setup, weights_of
from rmipo_lite.model import causal_lm
from rmipo_lite.model_files import (
    ADAPTER_CONFIG,
    base_of_adapter,
    check_model_folder,
    existing_folder,
    told,
)

Quantization = Literal["auto", "none", "4bit"]

# Of the free memory, what weights may take before "auto" goes to 4 bits: the rest is for
# activations, the adapter and its optimizer.
_WEIGHTS_SHARE = 0.6

_LONGEST_NAME = 80  # bytes of a model's name in a folder's, which may have 255 in all

# Spelled out, since transformers asks on standard input where nothing is said.
_NO_CODE = {"trust_remote_code": False}

# Where the model itself remembers its PeftModel, so that a second train() on the same object goes
# on with that adapter. In __dict__: nn.Module would register it as a child of itself.
_ADAPTED = "_rmipo_lite_adapted"


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model name or folder (no remote code).

    Raises:
        ValueError: the model was made in memory, so nobody knows its tokenizer, or none could be
            loaded.
        FileNotFoundError: a path where there is no folder.
    """
    if not name:
        raise ValueError(
            "tokenizer: this model was made in memory and names no folder to load a tokenizer "
            "from; pass one (tokenizer= of train(), processing_class= of RMiPOTrainer)"
        )
    place = str(existing_folder(name) or name)
    way_out = "Pass one: tokenizer= of train(), processing_class= of RMiPOTrainer"
    with told("tokenizer", name, way_out):
        return AutoTokenizer.from_pretrained(place, **_NO_CODE)


def load_model(
    name: str,
    args: RMiPOConfig,
    quantization_config: BitsAndBytesConfig | None = None,
) -> nn.Module:
    """Load a causal language model in the run's precision, or with quantised weights.

    A folder that holds an adapter loads its base model too, and the adapter goes on training.

    Raises:
        ValueError: the weights are pickled, it comes with code, or it could not be loaded.
        FileNotFoundError: a path where there is no model's folder.
    """
    folder = existing_folder(name)
    if folder is not None and (folder / ADAPTER_CONFIG).is_file():
        base = load_model(base_of_adapter(folder), args, quantization_config)
        with told("adapter", name, "Is its base the model it was trained on?"):
            adapted = PeftModel.from_pretrained(base, str(folder), is_trainable=True)
        require_adapter_weights(adapted, folder)
        return adapted
    if folder is not None:
        check_model_folder(folder)
        name = str(folder)
    kwargs: dict[str, Any] = {"dtype": args.dtype, "use_safetensors": True, **_NO_CODE}
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    if torch.cuda.is_available() and not args.use_cpu:
        # One card: "auto" would spread the layers over all of them, and the head with them.
        kwargs["device_map"] = {"": torch.cuda.current_device()}
    wanted = "Wanted a causal language model: a folder, or a hub name"
    with told("model", name, wanted), watched_bars(downloads=folder is None):
        model = AutoModelForCausalLM.from_pretrained(name, **kwargs)
    protect_4bit_on_cpu(model)
    return model


@contextlib.contextmanager
def watched_bars(*, downloads: bool = False) -> Iterator[None]:
    """transformers' bars where somebody watches: a terminal, or a download into a notebook."""
    logging = transformers.utils.logging
    is_watched = in_terminal() or (downloads and in_notebook())
    if is_watched or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def quantization_for(
    name: str, args: RMiPOConfig, quantization: Quantization | BitsAndBytesConfig
) -> BitsAndBytesConfig | None:
    """Resolve the `quantization` argument of `train()`.

    "auto" takes 4-bit on CUDA when the weights would take more than 60 % of the free memory.

    Raises:
        ValueError: neither auto, none, 4bit nor a BitsAndBytesConfig.
    """
    if isinstance(quantization, BitsAndBytesConfig):
        return quantization
    if quantization not in ("auto", "none", "4bit"):
        raise ValueError(
            "quantization must be 'auto', 'none', '4bit' or a BitsAndBytesConfig, got "
            f"{quantization!r}"
        )
    if quantization == "none" or (quantization == "auto" and not _too_large(name, args)):
        return None
    return nf4_config(args)


def nf4_config(args: RMiPOConfig) -> BitsAndBytesConfig:
    """NF4 with double quantisation (QLoRA, arXiv 2305.14314), computing in the run's precision."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=args.dtype,
    )


def _too_large(name: str, args: RMiPOConfig) -> bool:
    if not torch.cuda.is_available() or args.use_cpu:
        return False
    with told("model", name, "Wanted a causal language model: a folder, or a hub name"):
        config = AutoConfig.from_pretrained(existing_folder(name) or name, **_NO_CODE)
    setup = Setup(args.dtype, peft_config=None)
    free = free_bytes(torch.device("cuda", torch.cuda.current_device()))
    return wants_4bit(weights_of(config, setup).loaded_bytes(setup), free)


def wants_4bit(weight_bytes: float, free: float) -> bool:
    """What quantization="auto" decides on a card, by the bytes of the 16-bit weights and free."""
    return weight_bytes > _WEIGHTS_SHARE * free


def protect_4bit_on_cpu(model: nn.Module) -> None:
    """Keep 4-bit layers off bitsandbytes' packed CPU kernel.

    One evaluation pass in eval mode repacks the weights for it, and later backward passes then give
    silently wrong gradients: of 14 LoRA tensors 4 had one left (measured, bitsandbytes 0.50).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010, typed as Tensor


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
    causal_lm(adapted).__dict__[_ADAPTED] = adapted
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
    vars(causal_lm(base)).pop(_ADAPTED, None)
    return base


def _adapted(model: nn.Module) -> PeftModel | None:
    """The PeftModel that the model is or was wrapped in, if it still carries its layers."""
    if isinstance(model, PeftModel):
        return model
    if not any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        return None
    known = model.__dict__.get(_ADAPTED)
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


def name_of(model: str | nn.Module) -> str:
    """The name or folder that a model was loaded from; empty where it was made in memory."""
    return model if isinstance(model, str) else str(causal_lm(model).config.name_or_path or "")


def short_name(name: str) -> str:
    """A model's name for people: a hub name as it is, of a path the last part."""
    try:
        folder = existing_folder(name)
    except FileNotFoundError:  # it was there when the model was loaded
        folder = Path(name)
    return name if folder is None else folder.name


def run_name(model: str | nn.Module) -> str:
    """A folder name for a run on this model: `rmipo-<model name>`."""
    last = Path(name_of(model).rstrip("/")).name or "model"
    safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in last).lstrip(".")
    short = safe.encode()[:_LONGEST_NAME].decode(errors="ignore")
    return f"rmipo-{short or 'model'}"
