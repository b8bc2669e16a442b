"""How far two models are from each other on the same texts: KL of their next tokens, same first."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rmipo_lite.model.backbone import evaluating
from rmipo_lite.ops.devices import in_float64

_TEXTS, _TOKENS = 16, 256  # at most so many texts, and so many tokens of each


@dataclass(frozen=True)
class Agreement:
    """Of every next token over the texts: mean KL(first || second) in nats, share of equal top-1.

    `tokens` is how many places were compared.
    """

    kl: float
    top1: float
    tokens: int

    def __str__(self) -> str:
        return (
            f"KL from the trained model {self.kl:.2g} nats a token, the same likeliest token at "
            f"{self.top1:.1%} of {self.tokens} places"
        )


@torch.no_grad()
def agreement(first: Any, second: Any, texts: Sequence[list[int]]) -> Agreement | None:
    """Compare two models on the first texts of ids; None where there is no text."""
    total, same, tokens = 0.0, 0, 0
    with evaluating(first), evaluating(second):
        for ids in texts[:_TEXTS]:
            if not ids:
                continue
            row = torch.tensor([ids[-_TOKENS:]])
            p, q = (
                in_float64(model(row.to(next(model.parameters()).device)).logits[0]).log_softmax(-1)
                for model in (first, second)
            )
            q = q.to(p.device)
            total += float((p.exp() * (p - q)).sum())
            same += int((p.argmax(-1) == q.argmax(-1)).sum())
            tokens += len(p)
    return Agreement(total / tokens, same / tokens, tokens) if tokens else None
