"""Token log-probs from hidden states, without ever holding the (N, V) logits.

The losses here are functions of log-probs whose head is frozen, so the gradient of row t is a
number times the direction

    u_t = d logp_t / d hidden_t = sum_v (1[v = target] - p_tv) * (d logit_tv / d product_tv) * W_v

which is computed while a chunk's logits are hot. Forward is two matrix products, backward scales
rows. Where weight or bias is trained that would lose their gradient, so the logits are computed a
second time in the backward pass (the recomputing form). Without gradients it is one product.

Logits are float32 (float64 for float64) whatever the input: 16-bit logits cost up to 1.4e-2 nats.
On CUDA the product itself gives them (`out_dtype`); on the CPU, where it can't, the weight is cast
a block of rows at a time (on a CPU without 16-bit arithmetic that is also the faster way). Every
matrix product and allocation is made here, so that running out of memory keeps its type and text;
the kernels do the work on the rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rmipo_lite.ops import native, reference
from rmipo_lite.ops.checks import refuse_second_derivative
from rmipo_lite.ops.head_blocks import CPU_BLOCK_BYTES, blocked_logps
from rmipo_lite.ops.head_checks import check_head, check_ids
from rmipo_lite.ops.loss import Impl
from rmipo_lite.ops.reference import accumulate_dtype

# A chunk is as many rows as make about this many logits, within the range where a product still
# runs at full speed and the buffer stays small (128 MiB in float32). Below 128 rows the products
# lose a quarter of their speed; above 256 the first touch of a fresh buffer costs more than they
# gain.
_CHUNK_LOGITS = 2**25
_CHUNK_ROWS = (128, 256)
# Rows of the weight that are cast at a time on the CPU: 16 MiB in float32 at H = 512.
_BLOCK_ELEMENTS = 2**22

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


def _chunks(num_rows: int, vocab_size: int) -> Iterator[slice]:
    """Row ranges of nearly equal size."""
    smallest, largest = _CHUNK_ROWS
    rows = min(max(_CHUNK_LOGITS // vocab_size, smallest), largest)
    count = -(-num_rows // rows)
    for i in range(count):
        yield slice(num_rows * i // count, num_rows * (i + 1) // count)


def head_buffer_bytes(weight: Tensor) -> int:
    """Bytes that `linear_logps` takes beside its arguments and its results."""
    if weight.device.type == "cpu":
        return CPU_BLOCK_BYTES
    rows = next(_chunks(_CHUNK_ROWS[1], weight.shape[0])).stop
    # logits in float32, and where the weight is of 16 bits their derivative in its dtype
    itemsize = 4 if weight.dtype.itemsize >= 4 else 6
    return rows * weight.shape[0] * itemsize


class _Head:
    """The matrix products of one call, with float32 results and buffers reused across chunks."""

    def __init__(self, hidden: Tensor, weight: Tensor) -> None:
        self.hidden, self.weight = hidden, weight
        self.exact = accumulate_dtype(hidden.dtype)
        low_precision = hidden.dtype != self.exact
        self.mixed = low_precision and hidden.device.type == "cuda"
        self.cast = low_precision and not self.mixed
        self.chunks = list(_chunks(hidden.shape[0], weight.shape[0]))
        rows = max((c.stop - c.start for c in self.chunks), default=0)
        self.buffer = hidden.new_empty((rows, weight.shape[0]), dtype=self.exact)
        # On CUDA the second product needs its operand in the weight's dtype; elsewhere the
        # derivative overwrites the logits.
        self.grads = (
            hidden.new_empty((rows, weight.shape[0])) if self.mixed else self.buffer
        )  # fmt: skip
        block = max(1, _BLOCK_ELEMENTS // max(hidden.shape[1], 1)) if self.cast else len(weight)
        self.blocks = [slice(i, min(i + block, len(weight))) for i in range(0, len(weight), block)]

    def logits(self, rows: slice) -> Tensor:
        """Rows of hidden @ weight.T, in the buffer that the next call overwrites."""
        hidden, out = self.hidden[rows], self.buffer[: rows.stop - rows.start]
        if self.mixed:
            return torch.mm(hidden, self.weight.T, out_dtype=self.exact, out=out)
        hidden = hidden.to(self.exact)
        for block in self.blocks:
            torch.mm(hidden, self.weight[block].to(self.exact).T, out=out[:, block])
        return out

    def times_weight(self, grads: Tensor, out: Tensor) -> None:
        """Out (C, H) = grads (C, V) @ weight, in float32."""
        if self.mixed:
            torch.mm(grads, self.weight, out_dtype=self.exact, out=out)
            return
        out.zero_()
        for block in self.blocks:
            out.addmm_(grads[:, block], self.weight[block].to(self.exact))

    def add_weight_grad(self, grads: Tensor, rows: slice, out: Tensor) -> None:
        """Out (V, H) += grads.T @ hidden, in float32."""
        if self.mixed:
            out += torch.mm(grads.T, self.hidden[rows], out_dtype=self.exact)
        else:
            out.addmm_(grads.T, self.hidden[rows].to(self.exact))


def _rows(
    head: _Head,
    rows: slice,
    target_ids: Tensor,
    bias: Tensor | None,
    logit_softcap: float | None,
    logit_scale: float,
    row_scale: Tensor | None,
    use_native: bool,
    with_grads: bool,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of a chunk and, on demand, their derivative with respect to the product."""
    logits = head.logits(rows)
    scale = None if row_scale is None else row_scale[rows]
    if use_native:
        grads = head.grads[: rows.stop - rows.start] if with_grads else None
        logps = native.row_logps(
            logits, target_ids[rows], bias, logit_scale, logit_softcap, scale, grads
        )
        return logps, grads
    logps, exact_grads, invalid = reference.row_logps(
        logits, target_ids[rows], bias, logit_scale, logit_softcap, scale, with_grads=with_grads
    )
    if logits.device.type != "cpu":
        native.device_flag(logits.device).bitwise_or_(invalid)
    return logps, None if exact_grads is None else exact_grads.to(head.grads.dtype)


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
    if hidden.device.type == "cpu":
        check_ids(target_ids, weight.shape[0])
    with torch.autocast(hidden.device.type, enabled=False):
        use_native = native.use_native(impl, hidden.device)
        with_grads = mode == _DIRECTION
        if use_native and hidden.device.type == "cpu" and mode != _RECOMPUTE:
            return blocked_logps(
                hidden, weight, target_ids, bias, logit_softcap, logit_scale, with_grads
            )
        head = _Head(hidden, weight)
        logps = hidden.new_empty(hidden.shape[0], dtype=head.exact)
        directions = hidden.new_empty(
            (hidden.shape[0] if with_grads else 0, hidden.shape[1]), dtype=head.exact
        )
        for rows in head.chunks:
            logps[rows], grads = _rows(
                head,
                rows,
                target_ids,
                bias,
                logit_softcap,
                logit_scale,
                None,
                use_native,
                with_grads,
            )
            if grads is not None:
                head.times_weight(grads, directions[rows])
        return logps, directions


@_linear_logps.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    bias: Tensor | None,
    logit_softcap: float | None,
    logit_scale: float,
    mode: int,
    impl: str,
) -> tuple[Tensor, Tensor]:
    exact = accumulate_dtype(hidden.dtype)
    rows = hidden.shape[0] if mode == _DIRECTION else 0
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
        head = _Head(hidden, weight)
        grad_hidden = torch.empty_like(hidden, dtype=head.exact)
        grad_weight = torch.zeros_like(weight, dtype=head.exact)
        grad_bias = torch.zeros(
            len(weight) if bias is not None else 0, dtype=head.exact, device=hidden.device
        )
        for rows in head.chunks:
            _, grads = _rows(
                head,
                rows,
                target_ids,
                bias,
                logit_softcap,
                logit_scale,
                grad_logps,
                use_native,
                True,
            )
            assert grads is not None
            head.times_weight(grads, grad_hidden[rows])
            head.add_weight_grad(grads, rows, grad_weight)
            if bias is not None:
                grad_bias += grads.sum(0, dtype=head.exact)
        dtype = hidden.dtype
        return grad_hidden.to(dtype), grad_weight.to(dtype), grad_bias.to(dtype)


@_recompute_backward.register_fake
def _(
    grad_logps: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    bias: Tensor | None,
    logit_softcap: float | None,
    logit_scale: float,
    impl: str,
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
