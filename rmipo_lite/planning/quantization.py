"""Whether weights load in 4 bits, and how."""

from typing import Literal

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from rmipo_lite.config import RMiPOConfig
from rmipo_lite.model.loading import load_config, load_model
from rmipo_lite.model.names import short_name
from rmipo_lite.output.console import say
from rmipo_lite.planning.device import free_bytes
from rmipo_lite.planning.footprint import Setup, weights_of
from rmipo_lite.planning.half_range import keep_family_in_range

Quantization = Literal["auto", "none", "4bit"]


# Of the free memory, what weights may take before "auto" goes to 4 bits: the rest is for
# activations, the adapter and its optimizer.
_WEIGHTS_SHARE = 0.6


def quantization_for(
    name: str, args: RMiPOConfig, quantization: Quantization | BitsAndBytesConfig
) -> BitsAndBytesConfig | None:
    """Resolve the `quantization` argument of `train()`.

    "auto" takes 4-bit on CUDA when the weights would take more than 60 % of the free memory, and
    nowhere else: what bitsandbytes has for other devices is not tested here.

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


def load_for_run(
    name: str, args: RMiPOConfig, quantization: Quantization | BitsAndBytesConfig = "auto"
) -> nn.Module:
    """Load a model as a run wants it, in 4 bits where it must be, saying so.

    Raises:
        ValueError, FileNotFoundError: as `quantization_for` and `loading.load_model`.
    """
    keep_family_in_range(name, args)
    config = quantization_for(name, args, quantization)
    if config is not None and quantization == "auto":
        say("The weights would not fit beside training: they load in 4-bit (NF4).")
    say(f"Loading {short_name(name)}")
    return load_model(name, args, config)


def nf4_config(args: RMiPOConfig) -> BitsAndBytesConfig:
    """NF4 with double quantisation (QLoRA, arXiv 2305.14314), computing in the run's precision."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=args.dtype,
        # FSDP2 shares out numbers alone: the packed bits are stored as if they were some.
        bnb_4bit_quant_storage=args.dtype if args.shards_layers else torch.uint8,
    )


def _too_large(name: str, args: RMiPOConfig) -> bool:
    if args.device.type != "cuda":
        return False
    config = load_config(name)
    setup = Setup(args.weights_dtype, peft_config=None)
    free = free_bytes(torch.device("cuda", torch.cuda.current_device()))
    shared_by = args.world_size if args.shards_layers else 1
    return wants_4bit(weights_of(config, setup).loaded_bytes(setup, shared_by), free)


def wants_4bit(weight_bytes: float, free: float) -> bool:
    """What quantization="auto" decides on a card, by the bytes of the 16-bit weights and free."""
    return weight_bytes > _WEIGHTS_SHARE * free
