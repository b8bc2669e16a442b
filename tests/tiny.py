"""Tiny random models of many architectures and random pairs, for tests."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rmipo_lite.tokenization import TokenizedPair

VOCAB = 97

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# Windows of 8 are shorter than the pairs below, so a window that is not honoured shows.
ARCHITECTURES = {
    "llama": _COMMON,
    "mistral": {**_COMMON, "sliding_window": 8},
    "qwen2": _COMMON,
    "qwen2-sliding": {
        **_COMMON,
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
    },
    "qwen3": {**_COMMON, "head_dim": 8},
    "gemma2": {
        **_COMMON,
        "head_dim": 8,
        "sliding_window": 8,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {**_COMMON, "head_dim": 8, "sliding_window": 8, "num_hidden_layers": 6},
    "phi3": {**_COMMON, "sliding_window": 8},
    "granite": {
        **_COMMON,
        "logits_scaling": 4.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.5,
        "embedding_multiplier": 3.0,
    },
    "gpt2": {
        "vocab_size": VOCAB,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}


def tiny_model(name: str = "llama", **changes: object) -> PreTrainedModel:
    """A random model with weights large enough that its log-probs differ between tokens."""
    options = {**ARCHITECTURES[name], **changes}
    config = AutoConfig.for_model(name.removesuffix("-sliding"), **options)
    torch.manual_seed(0)
    # Stock sdpa of transformers before 5.20 ignores gemma2's softcap without a word.
    attention = {"attn_implementation": "eager"} if name == "gemma2" else {}
    model = AutoModelForCausalLM.from_config(config, **attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.2)
    return model.eval()


def random_pairs(
    count: int = 4, seed: int = 0, longest: int = 14, vocab: int = VOCAB
) -> list[TokenizedPair]:
    """Pairs of ragged lengths; the second has one-token responses where there are enough."""
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int) -> list[int]:
        length = int(torch.randint(low, longest + 1, (1,), generator=generator))
        return torch.randint(3, vocab, (length,), generator=generator).tolist()

    pairs = []
    for row in range(count):
        chosen, rejected = ids(2), ids(2)
        if row == 1:
            chosen, rejected = chosen[:1], rejected[:1]
        pairs.append(TokenizedPair(row, [1, *ids(1)], chosen, rejected))
    return pairs
