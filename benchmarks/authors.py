"""The authors' optimizer step in plain PyTorch: what a user of their code pays for.

Written from its description (arXiv 2604.24804 and the released `rmipo_trainer`), not copied: chosen
over rejected in one padded batch, logits of every position kept, log-softmax over all of them, and
a second padded pass over the bare responses whose logits are cast to float32. It is checked against
values recorded from their code (`tests/benchmarks/test_benchmarks.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from rmipo_lite.tokens.pair import TokenizedPair

IGNORED = -100
_GAMMA_MIN, _GAMMA_MAX = 0.3, 1.6  # constants in their code


class PaddedPairs(NamedTuple):
    """P pairs as 2P padded rows, chosen over rejected; labels are the ids, -100 unscored."""

    input_ids: Tensor  # (2P, T) int64
    attention_mask: Tensor  # (2P, T) int64
    labels: Tensor  # (2P, T) int64
    response_ids: Tensor  # (2P, R) int64
    response_mask: Tensor  # (2P, R) int64
    response_labels: Tensor  # (2P, R) int64


class AuthorsStep(NamedTuple):
    """What their step computes; `loss` carries the gradient."""

    loss: Tensor  # ()
    losses: Tensor  # (P,)
    chosen_logps: Tensor  # (P,) nats per token
    rejected_logps: Tensor  # (P,)
    pmi_gap: Tensor  # (P,)
    gamma: Tensor  # (P,) nats per token: beta multiplies it
    metrics: dict[str, Tensor]  # (), as they log them


def pad_pairs(pairs: Sequence[TokenizedPair], pad_id: int = 0) -> PaddedPairs:
    """Lay out pairs as their collator does."""
    prompts = [p.prompt_ids for p in pairs] + [
        p.prompt_ids if p.rejected_prompt_ids is None else p.rejected_prompt_ids for p in pairs
    ]
    responses = [p.chosen_ids for p in pairs] + [p.rejected_ids for p in pairs]
    texts = [a + b for a, b in zip(prompts, responses, strict=True)]
    labels = [[IGNORED] * len(a) + b for a, b in zip(prompts, responses, strict=True)]
    return PaddedPairs(
        _padded(texts, pad_id),
        _padded([[1] * len(text) for text in texts], 0),
        _padded(labels, IGNORED),
        _padded(responses, pad_id),
        _padded([[1] * len(response) for response in responses], 0),
        _padded(responses, IGNORED),
    )


def _padded(rows: Sequence[Sequence[int]], filler: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows])


def authors_step(model: nn.Module, pairs: PaddedPairs, beta: float = 2.0) -> AuthorsStep:
    """Forward pass, prior pass, loss and metrics of one micro-batch; the caller runs backward."""
    logits = model(pairs.input_ids, attention_mask=pairs.attention_mask, use_cache=False).logits
    logps = _mean_logps(logits, pairs.labels)
    with torch.no_grad():
        prior_logits = model(
            pairs.response_ids, attention_mask=pairs.response_mask, use_cache=False
        ).logits.to(torch.float32)
        prior_logps = _mean_logps(prior_logits, pairs.response_labels)
    chosen, rejected = logps.chunk(2)
    pmi = logps.detach() - prior_logps
    pmi_gap = pmi.chunk(2)[0] - pmi.chunk(2)[1]
    gamma = _GAMMA_MIN + (_GAMMA_MAX - _GAMMA_MIN) * torch.exp(-pmi_gap.clamp(min=0))
    losses = -logsigmoid(beta * (chosen - rejected - gamma))
    chosen_logits, rejected_logits = logits.detach().chunk(2)
    rewards = beta * chosen.detach(), beta * rejected.detach()
    metrics = {
        "rewards/chosen": rewards[0].mean(),
        "rewards/rejected": rewards[1].mean(),
        "rewards/accuracies": (rewards[0] > rewards[1]).float().mean(),
        "rewards/margins": (rewards[0] - rewards[1]).mean(),
        "logps/chosen": chosen.detach().mean(),
        "logps/rejected": rejected.detach().mean(),
        "logits/chosen": chosen_logits.mean(),
        "logits/rejected": rejected_logits.mean(),
    }
    return AuthorsStep(
        losses.mean(), losses, chosen.detach(), rejected.detach(), pmi_gap, gamma, metrics
    )


def _mean_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean log-probability of each row's labels, (2P,), from (2P, T, V) logits."""
    labels = labels[:, 1:].clone()
    logits = logits[:, :-1]
    mask = labels != IGNORED
    labels[~mask] = 0
    per_token = logits.log_softmax(-1).gather(2, labels.unsqueeze(2)).squeeze(2)
    return (per_token * mask).sum(-1) / mask.sum(-1)
