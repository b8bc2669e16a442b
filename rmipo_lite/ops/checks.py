"""Refusals shared by the operators: which operator, which argument, what was wanted, what came."""

from __future__ import annotations

import torch


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
