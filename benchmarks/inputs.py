"""What the benchmarks run on: random-weight Llamas and pairs with the lengths of real ones.

Times and memory don't depend on what the weights or tokens are, only on how many; the lengths in
`assets/lengths.csv` are token counts of public preference pairs (Anthropic HH helpful, PandaLM, a
politeness and a GPT-4-labelled set, under Qwen2's tokenizer and chat template).
"""

from __future__ import annotations

import csv
import random
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rmipo_lite.adapters.attach import attach_adapter
from rmipo_lite.adapters.lora import lora_config
from rmipo_lite.model.backbone import disable_dropout
from rmipo_lite.model.batch import micro_step_tokens
from rmipo_lite.tokens.pair import TokenizedPair

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HIDDEN_SIZE, LAYERS = 512, 8


class Lengths(NamedTuple):
    """Tokens of a pair."""

    prompt: int
    chosen: int
    rejected: int


@cache
def real_lengths() -> tuple[Lengths, ...]:
    """600 real pairs that fit 1024 tokens."""
    with (Path(__file__).parent / "assets" / "lengths.csv").open(newline="") as file:
        return tuple(Lengths(*map(int, row)) for row in list(csv.reader(file))[1:])


def draw_pairs(count: int, vocab_size: int, seed: int) -> list[TokenizedPair]:
    """Random tokens in the lengths of `count` real pairs."""
    chosen = random.Random(seed).sample(real_lengths(), count)
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> list[int]:
        return torch.randint(3, vocab_size, (length,), generator=generator).tolist()

    return [TokenizedPair(i, *(ids(length) for length in pair)) for i, pair in enumerate(chosen)]


def pairs_of_tokens(tokens: int, vocab_size: int) -> list[TokenizedPair]:
    """Real lengths, as many pairs as make up this many packed tokens."""
    pairs: list[TokenizedPair] = []
    for pair in draw_pairs(100, vocab_size, seed=0):
        if micro_step_tokens([*pairs, pair], packing=True) > tokens:
            continue
        pairs.append(pair)
    return pairs


def tiny_pair(vocab_size: int) -> TokenizedPair:
    """A pair of a few tokens, for a first step that loads what loads once."""
    return TokenizedPair(0, [vocab_size - 1] * 4, [5] * 4, [6] * 3)


def lora_llama(
    vocab_size: int, dtype: torch.dtype, layers: int = LAYERS, rank: int = 16
) -> torch.nn.Module:
    """A random Llama (H=512, 8/4 heads) with LoRA on every linear layer but the head."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=1376,  # 8/3 H, rounded up to a multiple of 32
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=16384,
        tie_word_embeddings=False,
        dtype=dtype,
    )
    torch.manual_seed(0)
    base: torch.nn.Module = LlamaForCausalLM(config)
    model = attach_adapter(base.to(dtype), lora_config(r=rank))
    disable_dropout(model)
    return model.train()
