"""Refusals shared by the operators: which operator, which argument, what was wanted, what came."""

from __future__ import annotations

import torch
from torch import Tensor


def require_dense(op: str, **named: object) -> None:
    """Raise unless every argument is a tensor of the ordinary, strided kind.

    Raises:
        TypeError: no tensor.
        ValueError: a sparse one.
    """
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
        if value.layout != torch.strided:
            raise ValueError(f"{op}: {name} must be dense, got layout {value.layout}")


def require_memory(op: str, **named: Tensor | None) -> None:
    """Raise for a tensor whose memory was given away, as sharding does with weights.

    torch's own operators end the process on one. Only where tensors are real: not under a trace.

    Raises:
        ValueError: naming the argument.
    """
    for name, value in named.items():
        if value is not None and value.numel() and not value.untyped_storage().nbytes():
            raise ValueError(
                f"{op}: {name} must hold its values, got a tensor of shape {tuple(value.shape)} "
                "whose memory was freed (is it sharded?)"
            )


def require(
    op: str,
    argument: str,
    demand: str,
    want: object,
    got: object,
    error: type[Exception] = ValueError,
) -> None:
    """Raise unless `want == got`; `demand` completes "`argument` must ...".

    Raises:
        ValueError: or the error type given, naming operator, argument, what was wanted, what came.
    """
    if want != got:
        raise error(f"{op}: {argument} must {demand}, {want}, got {got}")


def refuse_second_derivative(op: str) -> None:
    """Raise inside a backward pass that itself is to be differentiated (`create_graph=True`).

    Without this the second derivative would come out as zero, without a word.

    Raises:
        RuntimeError: gradients are being recorded.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{op}: second derivatives (create_graph=True) are not available; "
            "write the reference with plain PyTorch operations instead"
        )
