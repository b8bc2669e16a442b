"""From a name or folder to a model: config, tokenizer, weights in the run's precision or 4 bits.

Nothing that comes with a model is run, neither pickles nor code (`model_files`). Weights load in
the precision they are computed in, never silently in fp32.
"""

from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import GENERATION_CONFIG_NAME

from rmipo_lite.adapters.base_model import causal_lm, quiet_peft
from rmipo_lite.adapters.saved import require_adapter_weights, resize_for
from rmipo_lite.config import RMiPOConfig
from rmipo_lite.model.model_files import (
    ADAPTER_CONFIG,
    base_of_adapter,
    check_model_folder,
    existing_folder,
    named_errors,
)
from rmipo_lite.output.console import watched_bars

# Spelled out, since transformers asks on standard input where nothing is said.
_NO_CODE = {"trust_remote_code": False}
_WANTED = "Wanted a causal language model: a folder, or a hub name"


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
    with named_errors("tokenizer", name, way_out):
        return AutoTokenizer.from_pretrained(place, **_NO_CODE)


def load_config(name: str) -> PretrainedConfig:
    """The config of a model name or folder; of an adapter's folder, its base's. No weight is read.

    Raises:
        ValueError: it could not be loaded, or comes with code.
        FileNotFoundError: a path where there is no folder.
    """
    folder = existing_folder(name)
    if folder is not None and (folder / ADAPTER_CONFIG).is_file():
        return load_config(base_of_adapter(folder))
    with named_errors("model", name, _WANTED):
        config: PretrainedConfig = AutoConfig.from_pretrained(str(folder or name), **_NO_CODE)
    return config


def stored_dtype(name: str) -> torch.dtype | None:
    """What a model's files are in, as its config says; None where it has none."""
    if not name:
        return None
    try:
        dtype = getattr(load_config(name), "dtype", None)
    except (ValueError, OSError):  # it was there when the model was loaded
        return None
    return dtype if isinstance(dtype, torch.dtype) else None


def load_model(
    name: str, args: RMiPOConfig, quantization_config: BitsAndBytesConfig | None = None
) -> nn.Module:
    """Load a causal language model in the run's precision, or with quantised weights.

    A folder that holds an adapter loads its base model too, and the adapter goes on training.

    Raises:
        ValueError: the weights are pickled, it comes with code, it could not be loaded, or weights
            can't be quantised on this device.
        FileNotFoundError: a path where there is no model's folder.
    """
    if quantization_config is not None:
        _refuse_quantized(args.device.type)
    folder = existing_folder(name)
    if folder is not None and (folder / ADAPTER_CONFIG).is_file():
        base = load_model(base_of_adapter(folder), args, quantization_config)
        with named_errors("adapter", name, "Is its base the model it was trained on?"):
            resize_for(base, folder)
            with quiet_peft():
                adapted = PeftModel.from_pretrained(base, str(folder), is_trainable=True)
        require_adapter_weights(adapted, folder)
        if (folder / GENERATION_CONFIG_NAME).is_file():  # what it was taught to end with
            stops = GenerationConfig.from_pretrained(folder, local_files_only=True)
            causal_lm(adapted).generation_config = stops
        return adapted
    if folder is not None:
        check_model_folder(folder)
        name = str(folder)
    kwargs: dict[str, Any] = {"dtype": args.weights_dtype, "use_safetensors": True, **_NO_CODE}
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    if args.device.type != "cpu" and not args.shards_layers:  # shared out, it needs no card whole
        # One card: "auto" would spread the layers over all of them, and the head with them.
        on_cuda = args.device.type == "cuda"
        kwargs["device_map"] = {"": torch.cuda.current_device() if on_cuda else args.device}
    with named_errors("model", name, _WANTED), watched_bars(downloads=folder is None):
        model = AutoModelForCausalLM.from_pretrained(name, **kwargs)
    protect_4bit_on_cpu(model)
    return model


def _refuse_quantized(device_type: str) -> None:
    """Raise ValueError where bitsandbytes has nothing of its own for the device.

    What it falls back to on Apple's fetches code from a hub, or dequantises in plain PyTorch.
    """
    import bitsandbytes

    known = set(getattr(bitsandbytes, "supported_torch_devices", ())) - {"mps"}
    if device_type not in known:
        raise ValueError(
            f"quantization: there are no 4-bit weights on {device_type!r}, only on "
            f"{', '.join(sorted(known))} (bitsandbytes {bitsandbytes.__version__}); take "
            "quantization='none' with bf16=True, which halves the weights, or a smaller model"
        )


def protect_4bit_on_cpu(model: nn.Module) -> None:
    """Keep 4-bit layers off bitsandbytes' packed CPU kernel.

    One evaluation pass in eval mode repacks the weights for it, and later backward passes then give
    silently wrong gradients: of 14 LoRA tensors 4 had one left (measured, bitsandbytes 0.50).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010, typed as Tensor
