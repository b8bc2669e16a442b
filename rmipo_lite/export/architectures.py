"""What llama.cpp calls the parts of a model, and where it wants other numbers than transformers.

The names, keys and changes are those of llama.cpp's own converter (conversion/ in its repository,
MIT), read for each family; a family that isn't here is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Keys = dict[str, Any]  # method of gguf.GGUFWriter -> what it is given


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        name: llama.cpp's, in capitals, of `gguf.MODEL_ARCH`.
        permuted: whether the two halves of a rotated head lie in turn there.
        shifted: whether a norm's weight there has the 1 that transformers adds in its forward pass.
        own: keys beside those of every family.
    """

    name: str
    permuted: bool = False
    shifted: bool = False
    own: Callable[[Any], Keys] = lambda config: {}


def _of_llama(config: Any) -> Keys:
    return {"add_vocab_size": config.vocab_size, "add_rope_dimension_count": head_size(config)}


def _of_gemma2(config: Any) -> Keys:
    return {
        "add_attn_logit_softcapping": config.attn_logit_softcapping,
        "add_final_logit_softcapping": config.final_logit_softcapping,
        "add_sliding_window": config.sliding_window,
        **_head_lengths(config),
    }


def _of_gemma3(config: Any) -> Keys:
    softcap = config.final_logit_softcapping
    local = config.rope_parameters.get("sliding_attention", {}).get("rope_theta")
    return {
        "add_sliding_window": config.sliding_window,
        **({"add_final_logit_softcapping": softcap} if softcap else {}),
        **({"add_rope_freq_base_swa": local} if local else {}),
        **_head_lengths(config),
    }


def _of_phi3(config: Any) -> Keys:
    rotated = rope_of(config).get("partial_rotary_factor", 1.0)
    before = rope_of(config).get("original_max_position_embeddings")
    return {
        "add_rope_dimension_count": int(rotated * head_size(config)),
        "add_rope_scaling_orig_ctx_len": before or config.original_max_position_embeddings,
        "add_sliding_window": config.sliding_window or 0,
    }


def _of_granite(config: Any) -> Keys:
    return {
        **_of_llama(config),
        "add_attention_scale": config.attention_multiplier,
        "add_embedding_scale": config.embedding_multiplier,
        "add_residual_scale": config.residual_multiplier,
        "add_logit_scale": config.logits_scaling,
    }


FAMILIES: dict[str, Family] = {
    "llama": Family("LLAMA", permuted=True, own=_of_llama),
    "mistral": Family("LLAMA", permuted=True, own=_of_llama),
    "qwen2": Family("QWEN2"),
    "qwen3": Family("QWEN3"),
    "gemma2": Family("GEMMA2", shifted=True, own=_of_gemma2),
    "gemma3_text": Family("GEMMA3", shifted=True, own=_of_gemma3),
    "phi3": Family("PHI3", own=_of_phi3),
    "granite": Family("GRANITE", permuted=True, own=_of_granite),
}


def family_of(config: Any) -> Family:
    """The family of a model's config.

    Raises:
        ValueError: it isn't known here, or it does something that llama.cpp's file can't say.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ValueError(
            f"model: {config.model_type} can't be exported to GGUF here; known are "
            f"{', '.join(FAMILIES)}. llama.cpp's convert_hf_to_gguf.py takes the folder that "
            "merge() writes"
        )
    kind = rope_of(config).get("rope_type", "default")
    if kind not in ("default", "linear", "llama3", "yarn", "longrope"):
        raise ValueError(f"model: rotary positions of kind {kind!r} can't be exported to GGUF")
    if getattr(config, "use_sliding_window", False):
        raise ValueError(
            f"model: llama.cpp's {config.model_type} has no sliding window, and this one uses it"
        )
    return family


def rope_of(config: Any) -> dict[str, Any]:
    """The parameters of rotary positions; of layers of two kinds, those of full attention."""
    rope: dict[str, Any] = config.rope_parameters or {}
    return dict(rope.get("full_attention", rope))


def head_size(config: Any) -> int:
    """Numbers of a query of one head."""
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def _head_lengths(config: Any) -> Keys:
    return {"add_key_length": head_size(config), "add_value_length": head_size(config)}


def keys_of(config: Any) -> Keys:
    """What the file says of the architecture."""
    rope = rope_of(config)
    keys: Keys = {
        "add_block_count": config.num_hidden_layers,
        "add_context_length": config.max_position_embeddings,
        "add_embedding_length": config.hidden_size,
        "add_feed_forward_length": config.intermediate_size,
        "add_head_count": config.num_attention_heads,
        "add_head_count_kv": config.num_key_value_heads,
        "add_layer_norm_rms_eps": config.rms_norm_eps,
        "add_rope_freq_base": rope["rope_theta"],
    }
    if getattr(config, "head_dim", None) and config.model_type != "granite":
        keys |= _head_lengths(config)
    return {**keys, **_scaling(rope), **FAMILIES[config.model_type].own(config)}


def _scaling(rope: dict[str, Any]) -> Keys:
    from gguf import RopeScalingType

    kind = rope.get("rope_type", "default")
    if kind == "linear":
        return {
            "add_rope_scaling_type": RopeScalingType.LINEAR,
            "add_rope_scaling_factor": rope["factor"],
        }
    if kind == "longrope":
        return {"add_rope_scaling_type": RopeScalingType.LONGROPE}
    if kind != "yarn":
        return {}
    named = {
        "extrapolation_factor": "add_rope_scaling_yarn_ext_factor",
        "attention_factor": "add_rope_scaling_yarn_attn_factor",
        "beta_fast": "add_rope_scaling_yarn_beta_fast",
        "beta_slow": "add_rope_scaling_yarn_beta_slow",
    }
    return {
        "add_rope_scaling_type": RopeScalingType.YARN,
        "add_rope_scaling_factor": rope["factor"],
        "add_rope_scaling_orig_ctx_len": rope["original_max_position_embeddings"],
        **{key: rope[name] for name, key in named.items() if rope.get(name) is not None},
    }


def in_their_order(family: Family, config: Any, name: str, weight: Tensor) -> Tensor:
    """A weight with the numbers that llama.cpp wants."""
    if family.permuted and name.endswith(("q_proj.weight", "q_proj.bias")):
        return permuted(weight, config.num_attention_heads)
    if family.permuted and name.endswith(("k_proj.weight", "k_proj.bias")):
        return permuted(weight, config.num_key_value_heads)
    if family.shifted and name.endswith("norm.weight"):
        return weight.float() + 1
    return weight


def permuted(weight: Tensor, heads: int) -> Tensor:
    """Rows of every head, whose two halves are rotated together, taken from both in turn."""
    rows = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, rows, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def extra_tensors(config: Any) -> Iterator[tuple[str, Tensor]]:
    """What llama.cpp reads from tensors and transformers computes: factors of the frequencies."""
    rope = rope_of(config)
    if rope.get("rope_type") == "llama3":
        yield "rope_freqs.weight", _llama3_factors(rope, head_size(config))
    if rope.get("rope_type") == "longrope":
        for name in ("long", "short"):
            factors = torch.tensor(rope[f"{name}_factor"], dtype=torch.float32)
            yield f"rope_factors_{name}.weight", factors


def longrope_scale(config: Any) -> Keys:
    """By which attention's scores grow with a longer context (longrope alone)."""
    rope = rope_of(config)
    if rope.get("rope_type") != "longrope":
        return {}
    before = rope["original_max_position_embeddings"]
    scale = config.max_position_embeddings / before
    factor = math.sqrt(1 + math.log(scale) / math.log(before)) if scale > 1 else 1.0
    return {"add_rope_scaling_attn_factors": factor}


def _llama3_factors(rope: dict[str, Any], size: int) -> Tensor:
    """By which Llama 3.1 divides the frequencies: the slow ones all, the fast ones not at all."""
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    context = rope["original_max_position_embeddings"]
    wavelengths = 2 * math.pi / frequencies
    smooth = (context / wavelengths - low) / (high - low)
    found = 1 / ((1 - smooth) / factor + smooth)
    found[wavelengths < context / high] = 1.0
    found[wavelengths > context / low] = factor
    return found
