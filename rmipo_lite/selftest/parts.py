"""Tiny random models, pairs of ragged lengths, a word-level tokenizer, a trainer of all three."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from rmipo_lite.adapters import start
from rmipo_lite.config import RMiPOConfig
from rmipo_lite.tokens.pair import TokenizedPair
from rmipo_lite.training.trainer import RMiPOTrainer

VOCAB = 97

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# Windows of 8 are shorter than the pairs below, so a window that is not honoured shows.
_WINDOW = {"sliding_window": 8}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": _COMMON,
    "mistral": _COMMON | _WINDOW,
    "qwen2": _COMMON,
    "qwen2-sliding": _COMMON | _WINDOW | {"use_sliding_window": True, "max_window_layers": 1},
    "qwen3": _COMMON | {"head_dim": 8},
    "gemma2": _COMMON | _WINDOW | {
        "head_dim": 8, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0,
    },
    "gemma3_text": _COMMON | _WINDOW | {"head_dim": 8, "num_hidden_layers": 6},
    "phi3": _COMMON | _WINDOW,
    "granite": _COMMON | {
        "logits_scaling": 4.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5,
        "embedding_multiplier": 3.0,
    },
    "gpt2": {
        "vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "bos_token_id": 1,
        "eos_token_id": 2,
    },
}  # fmt: skip


def tiny_model(name: str = "llama", *, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A random model with weights large enough that its log-probs differ between tokens."""
    options = {**ARCHITECTURES[name], **changes}
    config = AutoConfig.for_model(name.removesuffix("-sliding"), **options)
    torch.manual_seed(seed)
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


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A word a token: `w3` to `w95` are the ids 3 to 95. It adds no BOS and no EOS itself."""
    words = ["<pad>", "<s>", "</s>", *(f"w{number}" for number in range(3, VOCAB - 1)), "<unk>"]
    table = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        pad_token="<pad>",
    )  # fmt: skip


def tiny_trainer(
    folder: Path,
    *,
    count: int = 8,
    model: PreTrainedModel | PeftModel | None = None,
    pairs: list[TokenizedPair] | None = None,
    eval_pairs: list[TokenizedPair] | None = None,
    callbacks: list[Any] | None = None,
    **options: Any,
) -> RMiPOTrainer:
    """A trainer on a tiny Llama: 4 pairs a step, LoRA of rank 4, everything logged."""
    settings: dict[str, Any] = {
        "max_steps": 4, "logging_steps": 1, "learning_rate": 1e-2, "save_strategy": "no",
        "per_device_train_batch_size": 4, "disable_tqdm": True, "use_cpu": True,
        "length_balance": "off", "end_anchor": 0.0, "sft_weight": 0.0, **options,  # the bare method
    }  # fmt: skip
    return RMiPOTrainer(
        tiny_model() if model is None else model,
        RMiPOConfig(str(folder), **settings),
        train_dataset=random_pairs(count) if pairs is None else pairs,
        eval_dataset=eval_pairs,
        processing_class=word_tokenizer(),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
        callbacks=callbacks,
    )


def trained_weights(trainer: RMiPOTrainer) -> dict[str, Tensor]:
    """Copies of the trained weights by name."""
    return start.trained_weights(trainer.model)


def equal_weights(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two sets of weights agree in every bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
