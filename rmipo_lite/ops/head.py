"""Token log-probs from hidden states, without ever holding the (N, V) logits.

The losses here are functions of log-probs whose head is frozen, so the gradient of row t is a
number times the direction

    u_t = d logp_t / d hidden_t = sum_v (1[v = target] - p_tv) * (d logit_tv / d product_tv) * W_v

which is computed while a chunk's logits are hot. Forward is two matrix products, backward scales
rows. Where weight or bias is trained that would lose their gradient, so the logits are computed a
second time in the backward pass (the recomputing form). Without gradients it is one product.

`head_rows` holds the logits of whole rows (CUDA, plain PyTorch, the recomputing form);
`head_blocks` goes over the vocabulary in blocks (the CPU's kernels). Every matrix product and
allocation is made in Python, so that running out of memory keeps its type and text; the kernels do
the work on the rows. Sums and results are float32 (float64 for float64) everywhere; logits too,
save where a CPU multiplies bfloat16 itself and gives bfloat16.
"""

from typing import Any

import torch
from torch import Tensor

from rmipo_lite.ops import native
from rmipo_lite.ops.checks import check_head, check_ids, refuse_second_derivative, require_memory
from rmipo_lite.ops.head_blocks import blocked_logps
from rmipo_lite.ops.head_rows import HeadProducts, row_work
from rmipo_lite.ops.native import Impl
from rmipo_lite.ops.reference import IGNORED, LogitTransform, accumulate_dtype

_VALUE, _DIRECTION, _RECOMPUTE = range(3)


def linear_logps(
    hidden: Tensor,  # (N, H) fp32 | bf16 | fp16 | fp64
    weight: Tensor,  # (V, H) same dtype
    target_ids: Tensor,  # (N,) int64, -100 ignored
    *,
    bias: Tensor | None = None,  # (V,) same dtype
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    impl: Impl = "auto",
) -> Tensor:  # (N,) fp32 (fp64 for fp64), nats; 0 where ignored
    """Log-probability of each target without storing the (N, V) logits.

    Same as `-F.cross_entropy(logits, target_ids, reduction="none")` with
    `logits = (hidden @ weight.T + bias).float() * logit_scale`, then, where a softcap is given,
    `logits = logit_softcap * tanh(logits / logit_softcap)`.

    On a CPU that multiplies bfloat16 itself the native products of bf16 inputs are bfloat16, as
    plain autograd's are: up to 1.4e-2 nats off. `impl="torch"` and CUDA have float32 products.

    Raises:
        ValueError: wrong shape or device, a softcap or scale that isn't a positive or finite
            number, a target outside 0 .. V-1 that isn't -100. On CUDA targets aren't read back: a
            bad one gives NaN and sets the device flag (`rmipo_lite.ops.native.device_flag`).
        TypeError: wrong dtype.
        RuntimeError: `impl="native"` and the extension isn't available; a second derivative.
    """
    check_head(hidden, weight, target_ids, bias, logit_softcap, logit_scale)
    native.check_impl("linear_logps", impl)
    mode = _VALUE
    if torch.is_grad_enabled():
        if weight.requires_grad or (bias is not None and bias.requires_grad):
            mode = _RECOMPUTE
        elif hidden.requires_grad:
            mode = _DIRECTION
    logps, _ = _linear_logps(
        hidden, weight, target_ids, bias, logit_softcap, float(logit_scale), mode, impl
    )
    return logps


@torch.library.custom_op("rmipo_lite::linear_logps", mutates_args=())
def _linear_logps(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    bias: Tensor | None,
    logit_softcap: float | None,
    logit_scale: float,
    mode: int,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Logps (N,) and the directions u (N, H), or an empty (0, H) where mode doesn't want them."""
    require_memory(
        "linear_logps", hidden=hidden, weight=weight, target_ids=target_ids, bias=bias
    )  # fmt: skip
    if hidden.device.type == "cpu":
        check_ids(target_ids, weight.shape[0])
    with torch.autocast(hidden.device.type, enabled=False):
        use_native = native.use_native(impl, hidden.device)
        transform = LogitTransform(bias, logit_softcap, logit_scale)
        with_grads = mode == _DIRECTION
        if use_native and hidden.device.type == "cpu" and mode != _RECOMPUTE:
            return blocked_logps(hidden, weight, target_ids, transform, with_grads)
        head = HeadProducts(hidden, weight)
        logps = hidden.new_empty(hidden.shape[0], dtype=head.exact)
        directions = hidden.new_empty(
            (hidden.shape[0] if with_grads else 0, hidden.shape[1]), dtype=head.exact
        )
        for rows in head.chunks:
            logps[rows], grads, factors = row_work(
                head, rows, target_ids, transform, None, use_native, with_grads
            )
            if grads is not None:
                head.times_weight(grads, directions[rows])
            if factors is not None:
                directions[rows] *= factors[:, None]
        return logps, directions


@_linear_logps.register_fake
def _(hidden: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    exact = accumulate_dtype(hidden.dtype)
    rows = hidden.shape[0] if others[-2] == _DIRECTION else 0  # the mode
    return (
        hidden.new_empty(hidden.shape[0], dtype=exact),
        hidden.new_empty((rows, hidden.shape[1]), dtype=exact),
    )


@torch.library.custom_op("rmipo_lite::scale_directions", mutates_args=())
def _scale_directions(directions: Tensor, grad_logps: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows times numbers in float32, one cast at the end, into a new tensor.

    A row that nothing asks for stays zero even where its direction isn't finite: 0 * NaN would be
    NaN in every weight below.
    """
    grad = grad_logps[:, None]
    return torch.where(grad == 0, 0.0, directions * grad).to(dtype)


@_scale_directions.register_fake
def _(directions: Tensor, grad_logps: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(directions, dtype=dtype)


@torch.library.custom_op("rmipo_lite::linear_logps_backward", mutates_args=())
def _recompute_backward(
    grad_logps: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    bias: Tensor | None,
    logit_softcap: float | None,
    logit_scale: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias (empty without one), accumulated in float32."""
    with torch.autocast(hidden.device.type, enabled=False):
        use_native = native.use_native(impl, hidden.device)
        transform = LogitTransform(bias, logit_softcap, logit_scale)
        # A row that nothing asks for is passed over as an ignored one is.
        target_ids = target_ids.masked_fill(grad_logps == 0, IGNORED)
        head = HeadProducts(hidden, weight)
        grad_hidden = torch.empty_like(hidden, dtype=head.exact)
        grad_weight = torch.zeros_like(weight, dtype=head.exact)
        grad_bias = torch.zeros(
            len(weight) if bias is not None else 0, dtype=head.exact, device=hidden.device
        )
        for rows in head.chunks:
            _, grads, _ = row_work(head, rows, target_ids, transform, grad_logps, use_native, True)
            assert grads is not None
            head.times_weight(grads, grad_hidden[rows])
            head.add_weight_grad(grads, rows, target_ids, grad_weight)
            if bias is not None:
                grad_bias += grads.sum(0, dtype=head.exact)
        dtype = hidden.dtype
        return grad_hidden.to(dtype), grad_weight.to(dtype), grad_bias.to(dtype)


@_recompute_backward.register_fake
def _(
    grad_logps: Tensor, hidden: Tensor, weight: Tensor, ids: Tensor, bias: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    grad_bias = hidden.new_empty(weight.shape[0] if bias is not None else 0)
    return torch.empty_like(hidden), torch.empty_like(weight), grad_bias


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    hidden, weight, target_ids, bias, softcap, scale, mode, impl = inputs
    ctx.mode, ctx.dtype, ctx.has_bias = mode, hidden.dtype, bias is not None
    ctx.options = (softcap, scale, impl)
    if mode == _RECOMPUTE:
        ctx.save_for_backward(hidden, weight, target_ids, *([bias] if ctx.has_bias else []))
    elif mode == _DIRECTION:
        ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad_logps, _):  # type: ignore[no-untyped-def]
    refuse_second_derivative("linear_logps")
    grad_hidden = grad_weight = grad_bias = None
    if ctx.mode == _DIRECTION:
        (directions,) = ctx.saved_tensors
        grad_hidden = _scale_directions(directions, grad_logps, ctx.dtype)
    elif ctx.mode == _RECOMPUTE:
        hidden, weight, target_ids, *rest = ctx.saved_tensors
        bias = rest[0] if ctx.has_bias else None
        grad_hidden, grad_weight, grad_bias = _recompute_backward(
            grad_logps, hidden, weight, target_ids, bias, *ctx.options
        )
    return grad_hidden, grad_weight, None, grad_bias if ctx.has_bias else None, *[None] * 4


_linear_logps.register_autograd(_backward, setup_context=_setup_context)
