"""A tiny Llama with LoRA under a stock Trainer: what checkpoint and interrupt tests train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from rmipo_lite.checkpoints.trainer_mixin import SafeCheckpointing

VOCABULARY = 64


class SafeTrainer(SafeCheckpointing, Trainer):
    """The mixin on the stock Trainer."""


def tiny_llama(seed: int = 0, dropout: float = 0.0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            attention_dropout=dropout,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def tiny_peft(seed: int = 0, dropout: float = 0.1) -> Any:
    config = LoraConfig(
        r=4, lora_alpha=8, lora_dropout=dropout, target_modules=["q_proj", "v_proj", "up_proj"]
    )
    return get_peft_model(tiny_llama(seed), config)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<unk>", "<s>", "</s>"] + [f"w{i}" for i in range(VOCABULARY - 3)]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def examples(count: int = 22) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(7)
    rows = torch.randint(3, VOCABULARY, (count, 8), generator=generator)
    return [{"input_ids": row, "labels": row} for row in rows]


def make_trainer(folder: Path, kind: type[Trainer] = SafeTrainer, **options: Any) -> Trainer:
    callbacks = options.pop("callbacks", None)
    model = options.pop("model", None) or tiny_peft()
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "logging_steps": 1,
        "save_steps": 2,
        "disable_tqdm": True,
        "report_to": "none",
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    args = TrainingArguments(str(folder), **(settings | options))
    return kind(
        model=model,
        args=args,
        data_collator=default_data_collator,
        train_dataset=examples(),
        eval_dataset=examples(6),
        processing_class=tiny_tokenizer(),
        callbacks=callbacks,
    )


def adapter_weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    named = trainer.model.named_parameters()
    return {name: p.detach().clone() for name, p in named if "lora_" in name}


def same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
