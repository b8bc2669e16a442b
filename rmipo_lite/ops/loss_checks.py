"""What the pair loss refuses, before a pointer is taken."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from rmipo_lite.ops.checks import require, require_dense
from rmipo_lite.ops.reference import SMOOTHED, PairOptions


def check_options(options: PairOptions) -> None:
    """Refuse constants out of their range.

    Raises:
        ValueError: naming the option, what it must be, what came.
    """

    def refuse(name: str, want: str) -> None:
        raise ValueError(f"pair_loss: {name} must be {want}, got {getattr(options, name)}")

    if not (math.isfinite(options.beta) and options.beta >= 0):
        refuse("beta", "finite and at least 0")
    if not (math.isfinite(options.gamma_min) and math.isfinite(options.gamma_max)):
        refuse("gamma_min" if not math.isfinite(options.gamma_min) else "gamma_max", "finite")
    if options.gamma_min > options.gamma_max:
        refuse("gamma_min", f"at most gamma_max = {options.gamma_max}")
    if not math.isfinite(options.simpo_gamma):
        refuse("simpo_gamma", "finite")
    if not 0 <= options.label_smoothing <= 1:
        refuse("label_smoothing", "between 0 and 1")
    if options.label_smoothing and options.loss_type not in SMOOTHED:
        refuse("label_smoothing", f"0 with loss_type {options.loss_type}, which has none")


def check_sequences(prefix: str, token_logps: Tensor, cu_seqlens: Tensor) -> None:
    """Refuse token log-probs and borders of the wrong dtype, shape or device.

    Raises:
        TypeError: a dtype.
        ValueError: anything else.
    """
    name, borders = f"{prefix}token_logps", f"{prefix}cu_seqlens"
    require_dense("pair_loss", **{name: token_logps, borders: cu_seqlens})
    if token_logps.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"pair_loss: {name} must be float32 or float64, got {token_logps.dtype}")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"pair_loss: {borders} must be int32, got {cu_seqlens.dtype}")
    if token_logps.dim() != 1:
        raise ValueError(
            f"pair_loss: {name} must have shape (num_tokens,), got {tuple(token_logps.shape)}"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] % 2 == 0:
        raise ValueError(
            f"pair_loss: {borders} must have shape (2 * num_pairs + 1,), "
            f"got {tuple(cu_seqlens.shape)}"
        )
    require(
        "pair_loss", borders, f"be on the device of {name}", token_logps.device, cu_seqlens.device
    )


def check_prior(
    token_logps: Tensor, cu_seqlens: Tensor, prior_token_logps: Tensor, prior_cu_seqlens: Tensor
) -> None:
    """Refuse a prior that does not fit its sequences.

    Raises:
        TypeError: a dtype.
        ValueError: a device or a shape.
    """
    require(
        "pair_loss", "prior_token_logps", "have the dtype of token_logps",
        token_logps.dtype, prior_token_logps.dtype, TypeError,
    )  # fmt: skip
    require(
        "pair_loss", "prior_token_logps", "be on the device of token_logps",
        token_logps.device, prior_token_logps.device,
    )  # fmt: skip
    require(
        "pair_loss", "prior_cu_seqlens", "have the shape of cu_seqlens",
        tuple(cu_seqlens.shape), tuple(prior_cu_seqlens.shape),
    )  # fmt: skip


def check_borders(name: str, cu_seqlens: Tensor, num_tokens: int, *, may_be_empty: bool) -> None:
    """Refuse borders that don't tile the tokens. Reads the values, so only for CPU tensors.

    Raises:
        ValueError: naming the border or the pair without a token.
    """
    borders = cu_seqlens.tolist()
    if borders[0] != 0 or borders[-1] != num_tokens:
        raise ValueError(
            f"pair_loss: {name} must run from 0 to the number of tokens {num_tokens}, "
            f"got {borders[0]} to {borders[-1]}"
        )
    for s, (start, end) in enumerate(itertools.pairwise(borders)):
        if end < start:
            raise ValueError(f"pair_loss: {name} must not descend, got {start} then {end} at {s}")
        if end == start and not may_be_empty:
            side = "rejected" if s % 2 else "chosen"
            raise ValueError(
                f"pair_loss: every sequence must have a token, but the {side} response of pair "
                f"{s // 2} has none"
            )
