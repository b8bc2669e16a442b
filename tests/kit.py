"""What tests and trials run on: tiny models and trainers, rows of text, tokenizers of every kind.

What the package's own self-test needs too comes from there.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from rmipo_lite import TrainResult, train
from rmipo_lite.checkpoints.trainer_mixin import SafeCheckpointing
from rmipo_lite.demo import data
from rmipo_lite.selftest.parts import (
    ARCHITECTURES,
    VOCAB,
    equal_weights,
    random_pairs,
    tiny_model,
    tiny_trainer,
    trained_weights,
    word_tokenizer,
)

__all__ = [
    "ARCHITECTURES",
    "BOS",
    "BOS_ID",
    "EOS",
    "EOS_ID",
    "UNKNOWN_ID",
    "VOCAB",
    "SafeTrainer",
    "byte_level",
    "chat_row",
    "equal_weights",
    "logged_losses",
    "make_trainer",
    "random_pairs",
    "sentencepiece_like",
    "text_row",
    "tiny_model",
    "tiny_peft",
    "tiny_trainer",
    "train_words",
    "trained_weights",
    "word_level",
    "word_rows",
    "word_tokenizer",
]

# ---- rows of words, and a run on them -------------------------------------------------------


def text_row(prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    """A row of three texts."""
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def chat_row(prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    """The same as messages."""
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def word_rows(count: int, seed: int = 0, longest: int = 14) -> list[dict[str, str]]:
    """`random_pairs` as text rows of `word_tokenizer`."""
    return [
        {
            "prompt": _words(pair.prompt_ids[1:]),
            "chosen": _words(pair.chosen_ids),
            "rejected": _words(pair.rejected_ids),
        }
        for pair in random_pairs(count, seed, longest, VOCAB - 1)
    ]


def _words(ids: list[int]) -> str:
    return " ".join(f"w{token_id}" for token_id in ids)


def train_words(
    model: Any,
    folder: Path,
    rows: Any = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    **options: Any,
) -> TrainResult:
    """`train()` on rows of the word tokenizer, four pairs a step; it answers no prompts."""
    settings: dict[str, Any] = {
        "eval_completions": 0,
        "sample_prompts": 0,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "use_cpu": True,
        **options,
    }
    return train(
        model,
        rows or word_rows(16),
        tokenizer=tokenizer or word_tokenizer(),
        output_dir=folder,
        **settings,
    )


def logged_losses(trainer: Trainer) -> list[float]:
    """The training losses in the log."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# ---- a stock Trainer: what checkpoints and interrupts are tried on --------------------------


class SafeTrainer(SafeCheckpointing, Trainer):
    """The mixin on the stock Trainer."""


def tiny_peft(seed: int = 0, dropout: float = 0.1) -> Any:
    """A tiny Llama with LoRA on some of its layers."""
    config = LoraConfig(
        r=4, lora_alpha=8, lora_dropout=dropout, target_modules=["q_proj", "v_proj", "up_proj"]
    )
    return get_peft_model(tiny_model(seed=seed), config)


def _examples(count: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(7)
    rows = torch.randint(3, VOCAB - 1, (count, 8), generator=generator)
    return [{"input_ids": row, "labels": row} for row in rows]


def make_trainer(folder: Path, kind: type[Trainer] = SafeTrainer, **options: Any) -> Trainer:
    """A trainer of language, eleven steps in two epochs, that saves every second one."""
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
        train_dataset=_examples(22),
        eval_dataset=_examples(6),
        processing_class=word_tokenizer(),
        callbacks=callbacks,
    )


# ---- tokenizers -----------------------------------------------------------------------------

BOS, EOS, PAD, UNKNOWN = "<s>", "</s>", "<pad>", "<unk>"
BOS_ID, EOS_ID, UNKNOWN_ID = 1, 2, 3
_MARK = "\u2581"  # what sentencepiece writes for a space
_CHARACTERS = _MARK + "abcdefghijklmnopqrstuvwxyz0123456789.,:!?'\néü你"
# The last ones merge what the package puts in front of a response to tokenise it.
_MERGES = (
    "_ a|_ t|_t h|_th e|h e|i n|in g|e r|a n|r e|o n|l l|a b|ab c|1 2|. .|.. .|' s|_ 1|é é"
    "|_ _|__ __|\n \n|: :"
)


@functools.cache
def byte_level() -> Any:
    """The demo's byte-level BPE of 512 tokens, with a chat template; adds nothing by itself."""
    return data.load_tokenizer()


@functools.cache
def sentencepiece_like(model: Literal["bpe", "unigram"]) -> Any:
    """Byte fallback, spaces as marks, and a mark before every text, as Llama's tokenizers have."""
    pieces = [PAD, BOS, EOS, UNKNOWN, *(f"<0x{byte:02X}>" for byte in range(256)), *_CHARACTERS]
    merges = []
    for merge in _MERGES.replace("_", _MARK).split("|"):
        left, right = merge.split(" ")
        merges.append((left, right))
        pieces.append(left + right)
    if model == "bpe":
        table = {piece: number for number, piece in enumerate(pieces)}
        backend: Any = Tokenizer(
            models.BPE(table, merges, unk_token=UNKNOWN, byte_fallback=True, fuse_unk=True)
        )
        spaces = normalizers.Replace(" ", _MARK)
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(_MARK), spaces])
    else:
        scores = [(piece, -10.0 / len(piece)) for piece in pieces]
        backend = Tokenizer(models.Unigram(scores, unk_id=UNKNOWN_ID, byte_fallback=True))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(_MARK, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return _fast(backend)


def word_level(words: Sequence[str], *, adds_bos: bool = False, **special: Any) -> Any:
    """A token for every word between spaces; what is no word is unknown."""
    vocab = {token: number for number, token in enumerate((PAD, BOS, EOS, UNKNOWN, *words))}
    backend: Any = Tokenizer(models.WordLevel(vocab, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)]
        )
    return _fast(backend, **special)


def _fast(backend: Any, **special: Any) -> Any:
    names = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "unk_token": UNKNOWN} | special
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **names
    )
