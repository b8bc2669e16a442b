"""What `linear_logps` refuses, before a pointer is taken."""

from __future__ import annotations

import torch
from torch import Tensor

from rmipo_lite.ops.checks import require, require_dense
from rmipo_lite.ops.reference import IGNORED

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_head(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    bias: Tensor | None,
    logit_softcap: float | None,
    logit_scale: float,
) -> None:
    """Refuse arguments of the wrong kind, dtype, rank, shape or device.

    Raises:
        TypeError: no tensor, or of the wrong dtype.
        ValueError: anything else.
    """
    op = "linear_logps"
    require_dense(op, hidden=hidden, weight=weight, target_ids=target_ids)
    if hidden.dtype not in _DTYPES:
        raise TypeError(
            f"{op}: hidden must be float32, bfloat16, float16 or float64, got {hidden.dtype}"
        )
    require(op, "weight", "have the dtype of hidden", hidden.dtype, weight.dtype, TypeError)
    require(op, "target_ids", "have dtype", torch.int64, target_ids.dtype, TypeError)
    if hidden.dim() != 2:
        raise ValueError(
            f"{op}: hidden must have shape (num_tokens, hidden_size), got {tuple(hidden.shape)}"
        )
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or weight.shape[0] == 0:
        raise ValueError(
            f"{op}: weight must have shape (vocab_size, hidden_size) = (V, {hidden.shape[1]}) "
            f"with V at least 1, got {tuple(weight.shape)}"
        )
    if tuple(target_ids.shape) != (hidden.shape[0],):
        raise ValueError(
            f"{op}: target_ids must have shape (num_tokens,) = ({hidden.shape[0]},), "
            f"got {tuple(target_ids.shape)}"
        )
    require(op, "weight", "be on the device of hidden", hidden.device, weight.device)
    require(op, "target_ids", "be on the device of hidden", hidden.device, target_ids.device)
    if bias is not None:
        require_dense(op, bias=bias)
        require(op, "bias", "have the dtype of hidden", hidden.dtype, bias.dtype, TypeError)
        if tuple(bias.shape) != (weight.shape[0],):
            raise ValueError(
                f"{op}: bias must have shape (vocab_size,) = ({weight.shape[0]},), "
                f"got {tuple(bias.shape)}"
            )
        require(op, "bias", "be on the device of hidden", hidden.device, bias.device)
    if logit_softcap is not None and not 0 < logit_softcap < float("inf"):
        raise ValueError(f"{op}: logit_softcap must be positive or None, got {logit_softcap}")
    if not abs(logit_scale) < float("inf"):
        raise ValueError(f"{op}: logit_scale must be finite, got {logit_scale}")


def check_ids(target_ids: Tensor, vocab_size: int) -> None:
    """Refuse targets that are no token. Reads the values, so only for CPU tensors.

    Raises:
        ValueError: naming the first such target and its row.
    """
    bad = ((target_ids < 0) | (target_ids >= vocab_size)) & (target_ids != IGNORED)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"linear_logps: target_ids must be 0 to {vocab_size - 1} or {IGNORED} (ignored), "
            f"got {int(target_ids[row])} at row {row}"
        )
