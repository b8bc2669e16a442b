"""NEFTune (arXiv 2310.05914): uniform noise on the embeddings while the policy trains.

transformers' hook draws for a whole row of the model's input: its scale and its numbers then depend
on what shares the row, and the prior pass gets noise too. Here every pair draws its own from the
step's seed and its row number, so that packing and micro-steps change nothing.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rmipo_lite.adapters.base_model import causal_lm
from rmipo_lite.model.batch import sides
from rmipo_lite.tokens.pair import TokenizedPair


@contextmanager
def embedding_noise(
    model: nn.Module, alpha: float, seed: int, pairs: Sequence[TokenizedPair], packing: bool
) -> Iterator[None]:
    """Inside the block the embeddings of these pairs' policy pass carry noise.

    Uniform in +-alpha / sqrt(L * H): L tokens of the pair's longer sequence, H the width. The
    prompt's tokens have the same noise before both responses.
    """

    def add(module: nn.Module, inputs: Any, embedded: Tensor) -> Tensor:  # (B, T, H)
        width = embedded.shape[-1]
        rows = [side for pair in pairs for side in _noise(pair, width, alpha, seed, packing)]
        noise = torch.zeros_like(embedded)
        if packing:
            noise[0] = torch.cat(rows)
        else:
            for place, row in zip(noise, rows, strict=True):
                place[: len(row)] = row
        return embedded + noise

    handle = causal_lm(model).get_input_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def _noise(
    pair: TokenizedPair, width: int, alpha: float, seed: int, packing: bool
) -> tuple[Tensor, Tensor]:
    """Noise of both sides' fed tokens, (tokens, H); packed, the prompt's stands once."""
    chosen, rejected = sides(pair)
    longest_prompt = max(len(chosen.context), len(rejected.context))
    num_drawn = longest_prompt + len(chosen.response) + len(rejected.response)
    generator = torch.Generator().manual_seed((seed * 1_000_003 + pair.row) % 2**63)
    scale = alpha / (max(len(chosen.fed), len(rejected.fed), 1) * width) ** 0.5
    drawn = (torch.rand(num_drawn, width, generator=generator) * 2 - 1) * scale
    prompt, of_chosen, of_rejected = drawn.split(
        [longest_prompt, len(chosen.response), len(rejected.response)]
    )
    first = torch.cat([prompt[: len(chosen.context)], of_chosen])[: len(chosen.fed)]
    if packing:
        return first, of_rejected[: len(rejected.response) - 1]
    second = torch.cat([prompt[: len(rejected.context)], of_rejected])[: len(rejected.fed)]
    return first, second
