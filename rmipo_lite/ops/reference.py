"""The operators in plain PyTorch: the definition of correct, and the path where nothing is built.

Two pieces. `row_logps` is the work on a chunk of logits: log-probability of each row's target and,
on demand, its derivative with respect to the matrix product that gave the logits. `pair_losses` is
the loss of a batch of pairs. Both follow the same rules as the C++ and CUDA kernels in `csrc/`,
which are tested against this file in float64.

The losses themselves stand in `losses`.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rmipo_lite.ops.losses import PairOptions, loss_named, margins

IGNORED = -100  # target id of a row that is not scored: log-probability 0, gradient 0


class PairParts(NamedTuple):
    """Everything a pair loss computes; logps are ordered chosen, rejected, chosen, ..."""

    loss: Tensor  # (P,)
    gamma: Tensor  # (P,)
    pmi_gap: Tensor  # (P,) nats per token
    logps: Tensor  # (2P,) nats per token
    prior_logps: Tensor  # (2P,) nats per token, NaN where the prior scores no token
    mean_grads: Tensor  # (2P,) d loss[s // 2] / d logps[s]


class LogitTransform(NamedTuple):
    """From a product hidden @ weight.T to a logit: softcap * tanh((x + bias) * scale / softcap)."""

    bias: Tensor | None = None  # (V,)
    softcap: float | None = None  # None: (x + bias) * scale
    scale: float = 1.0


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Float64 for float64, else float32: what logits, sums and results are held in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_logps(
    logits: Tensor,  # (C, V), the bare product hidden @ weight.T
    target_ids: Tensor,  # (C,) int64
    transform: LogitTransform,
    row_scale: Tensor | None,  # (C,) what each row's derivative is multiplied by; None: 1
    *,
    with_grads: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Log-probability of each row's target, its derivative, and whether a target was no token.

    Same as `log_softmax(softcap * tanh((logits + bias) * scale / softcap), -1)[target]`, with 0
    where the target is -100 (the row isn't read) and NaN where it is outside 0 .. V-1.

    Returns:
        logps (C,), d logps / d logits (C, V) or None, and invalid () bool.
    """
    vocab_size = logits.shape[1]
    x = logits.to(accumulate_dtype(logits.dtype))
    bias, softcap, scale = transform
    if bias is not None:
        x = x + bias.to(x.dtype)
    x = x * scale
    slope: Tensor | float = scale
    if softcap is not None:
        tanh = torch.tanh(x / softcap)
        x = softcap * tanh
        slope = scale * (1 - tanh * tanh)
    ignored = target_ids == IGNORED
    invalid = ((target_ids < 0) | (target_ids >= vocab_size)) & ~ignored
    safe_ids = target_ids.clamp(0, vocab_size - 1)[:, None]
    # Not log_softmax: its running float32 sum is off by 2e-5 over 256k tokens; sum() adds in pairs.
    x = x - x.amax(dim=-1, keepdim=True)
    at_target = x.gather(1, safe_ids)[:, 0]
    exponentials = x.exp_()
    total = exponentials.sum(dim=-1)
    logps = at_target - total.log()
    logps = logps.masked_fill(invalid, math.nan).masked_fill(ignored, 0.0)
    if not with_grads:
        return logps, None, invalid.any()
    grads = exponentials / -total[:, None]
    grads.scatter_add_(1, safe_ids, torch.ones_like(grads[:, :1]))
    grads = grads * slope
    if row_scale is not None:
        grads = grads * row_scale[:, None].to(grads.dtype)
    grads = grads.masked_fill(invalid[:, None], math.nan).masked_fill(ignored[:, None], 0.0)
    return logps, grads, invalid.any()


def sequence_of_token(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """Index of the sequence each packed token belongs to, (N,) int64; safe for any borders."""
    tokens = torch.arange(num_tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    last = max(cu_seqlens.shape[0] - 2, 0)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), tokens, right=True).clamp(max=last)


def sequence_means(token_logps: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over every sequence in float64 (S,), NaN where it has no token, and its length (S,)."""
    lengths = cu_seqlens.diff().to(torch.int64)
    sums = torch.zeros(lengths.shape[0], dtype=torch.float64, device=token_logps.device)
    index = sequence_of_token(cu_seqlens, token_logps.shape[0])
    sums.index_add_(0, index, token_logps.double())
    return torch.where(lengths > 0, sums / lengths, math.nan), lengths


def pair_losses(
    token_logps: Tensor,  # (N,) nats
    cu_seqlens: Tensor,  # (2P + 1,) int32
    prior_token_logps: Tensor | None,  # (M,) nats
    prior_cu_seqlens: Tensor | None,  # (2P + 1,) int32
    options: PairOptions,
) -> PairParts:
    """Loss of every pair with its parts, in token_logps' dtype; see `rmipo_lite.ops.pair_loss`."""
    dtype = token_logps.dtype
    means, _ = sequence_means(token_logps, cu_seqlens)
    pairs = means.shape[0] // 2
    chosen, rejected = means[0::2], means[1::2]
    pmi_gap = means.new_zeros(pairs)
    prior = means.new_full((means.shape[0],), math.nan)
    if prior_token_logps is not None and prior_cu_seqlens is not None:
        prior, lengths = sequence_means(prior_token_logps, prior_cu_seqlens)
        pmi = means - prior
        # A side without a prior has no PMI: the pair counts as gap 0, hence gamma_max.
        defined = (lengths[0::2] > 0) & (lengths[1::2] > 0)
        pmi_gap = torch.where(defined, pmi[0::2] - pmi[1::2], 0.0)
    gamma = margins(pmi_gap, options)
    formula = loss_named(options.loss_type).formula
    loss, grad_chosen, grad_rejected = formula(chosen, rejected, gamma, options)
    mean_grads = torch.stack([grad_chosen, grad_rejected], dim=1).flatten()
    parts = (loss, gamma, pmi_gap, means, prior, mean_grads)
    return PairParts(*(part.to(dtype) for part in parts))
