"""What servers will say of an adapter."""

from __future__ import annotations

from typing import Any

from peft import PeftModel

from rmipo_lite.adapters.start import changes_base

_USUAL_RANK = 16  # vLLM's own --max-lora-rank
_RANKS = (16, 32, 64, 128, 256, 320, 512)  # that it can be set to


def serving_note(model: Any) -> str | None:
    """How vLLM and SGLang take a saved adapter, by the rules of vLLM's `peft_helper`.

    Nothing is tried: a server is no part of this. None of a model without an adapter.
    """
    if not isinstance(model, PeftModel):
        return None
    config: Any = model.active_peft_config
    refused = [
        what
        for is_so, what in (
            (str(getattr(config.peft_type, "value", config.peft_type)) != "LORA", "no LoRA"),
            (getattr(config, "use_dora", False), "DoRA"),
            (getattr(config, "bias", "none") != "none", "biases"),
            (getattr(config, "lora_bias", False), "biases of LoRA"),
            (getattr(config, "modules_to_save", None), "whole layers beside it (modules_to_save)"),
            (getattr(config, "trainable_token_indices", None), "single tokens' embeddings"),
        )
        if is_so
    ]
    if refused:
        return (
            f"vLLM and SGLang refuse this adapter ({', '.join(refused)}): serve the merged model "
            "(`rmipo-lite merge`)."
        )
    rank = max(config.r, *(config.rank_pattern or {}).values(), 0)
    rank *= 2 if changes_base(config) else 1  # as it is saved: the difference to its start
    flag = next((known for known in _RANKS if known >= rank), None)
    if flag is None:
        return f"Its rank of {rank} is more than vLLM takes ({_RANKS[-1]}): serve the merged model."
    more = "" if flag == _USUAL_RANK else f" --max-lora-rank {flag}"
    return f"vLLM serves it upon its base with `--enable-lora{more}` (by its rules; not tried)."
