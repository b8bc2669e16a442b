"""What the operators refuse, before a pointer is taken.

Every message names the operator, the argument, what was wanted and what came.
"""

import itertools

import torch
from torch import Tensor

from rmipo_lite.ops.losses import PairOptions, option_problem
from rmipo_lite.ops.reference import IGNORED


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


# ---- linear_logps ---------------------------------------------------------------------------

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


def check_options(options: PairOptions) -> None:
    """Refuse an unknown loss and constants out of their range.

    Raises:
        ValueError: naming the option, what it must be, what came.
    """
    try:
        problem = option_problem(options, strict=False)
    except ValueError as error:
        problem = str(error)
    if problem is not None:
        raise ValueError(f"pair_loss: {problem}")


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
