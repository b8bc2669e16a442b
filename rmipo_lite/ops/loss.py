"""The pair loss as an operator: token log-probs in, per-pair loss and its parts out.

    logps    = mean of a sequence's token log-probs                    nats per token
    pmi      = logps - prior_logps                                     detached
    pmi_gap  = pmi[chosen] - pmi[rejected]                             0 where a side has no prior
    gamma    = gamma_min + (gamma_max - gamma_min) * exp(-max(0, pmi_gap))
    D        = logps[chosen] - logps[rejected]
    rmipo    = -logsigmoid(beta * D - gamma)          -logsigmoid(beta * (D - gamma)) when scaled
    simpo    = -logsigmoid(beta * D - simpo_gamma)
    hinge    = relu(1 - (beta * D - simpo_gamma))
    simper   = -exp(logps[chosen]) + exp(logps[rejected])

The derivative with respect to the two means falls out of the forward pass, so the backward pass
only spreads it over the tokens. Means, PMI and gamma carry no gradient: gamma is a target that the
method sets, and a gradient through it would let the policy lower its own margin.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rmipo_lite.ops import native, reference
from rmipo_lite.ops.checks import (
    check_borders,
    check_options,
    check_prior,
    check_sequences,
    refuse_second_derivative,
    require,
    require_dense,
    require_memory,
)
from rmipo_lite.ops.devices import has_float64, in_float64
from rmipo_lite.ops.losses import PairOptions, loss_named
from rmipo_lite.ops.native import Impl
from rmipo_lite.ops.reference import PairParts


class LossOutput(NamedTuple):
    """What `rmipo_loss` returns; only `loss` carries a gradient."""

    loss: Tensor  # (P,)
    gamma: Tensor  # (P,) reward units; nats per token with gamma_scaled_by_beta
    pmi_gap: Tensor  # (P,) nats per token


class PairLossOutput(NamedTuple):
    """What `pair_loss` returns; only `loss` carries a gradient, to `token_logps`."""

    loss: Tensor  # (P,)
    gamma: Tensor  # (P,) the margin used: adaptive, `simpo_gamma`, or 0 for simper
    pmi_gap: Tensor  # (P,) nats per token; 0 where undefined or without a prior
    logps: Tensor  # (2P,) nats per token, C1 R1 C2 R2 ...
    prior_logps: Tensor | None  # (2P,) NaN where a prior scores no token; None without a prior


def pair_loss(
    token_logps: Tensor,  # (N,) fp32 | fp64, nats
    cu_seqlens: Tensor,  # (2P + 1,) int32, sequences C1 R1 C2 R2 ...
    prior_token_logps: Tensor | None = None,  # (M,) same dtype, nats
    prior_cu_seqlens: Tensor | None = None,  # (2P + 1,) int32
    *,
    loss_type: str = "rmipo",  # a name of `losses.LOSSES`
    beta: float = 2.0,
    gamma_min: float = 0.3,
    gamma_max: float = 1.6,
    gamma_scaled_by_beta: bool = False,
    label_smoothing: float = 0.0,
    simpo_gamma: float = 0.5,
    impl: Impl = "auto",
) -> PairLossOutput:
    """Loss of every pair of packed sequences (arXiv 2604.24804; formulas at the top of this file).

    A response whose prior scores no token has no PMI: its pair takes `pmi_gap` 0, hence
    `gamma_max`. NaN in, NaN out. The authors' `gamma_beta_ratio` g is `simpo_gamma = beta * g`.

    Raises:
        ValueError: a tensor of the wrong shape, borders that don't tile the tokens, a pair with a
            side of no tokens, an unknown loss, an option out of its range, label smoothing with a
            loss that has none. On CUDA borders aren't read back: a bad one gives NaN and sets the
            device flag (`rmipo_lite.ops.native.device_flag`).
        TypeError: a tensor of the wrong dtype.
        RuntimeError: `impl="native"` and the extension isn't available; a second derivative.
    """
    options = PairOptions(
        loss_type, beta, gamma_min, gamma_max, gamma_scaled_by_beta, label_smoothing, simpo_gamma
    )
    check_options(options)
    check_sequences("", token_logps, cu_seqlens)
    if (prior_token_logps is None) != (prior_cu_seqlens is None):
        raise ValueError("pair_loss: prior_token_logps and prior_cu_seqlens go together, got one")
    if prior_token_logps is not None and prior_cu_seqlens is not None:
        check_sequences("prior_", prior_token_logps, prior_cu_seqlens)
        check_prior(token_logps, cu_seqlens, prior_token_logps, prior_cu_seqlens)
    elif loss_named(loss_type).needs_prior:
        raise ValueError(f"pair_loss: loss_type {loss_type} needs prior_token_logps, got None")
    native.check_impl("pair_loss", impl)
    parts = PairParts(
        *_pair_loss(
            token_logps,
            cu_seqlens,
            None if prior_token_logps is None else prior_token_logps.detach(),
            prior_cu_seqlens,
            *options,
            impl,
        )
    )
    prior_logps = None if prior_token_logps is None else parts.prior_logps
    return PairLossOutput(parts.loss, parts.gamma, parts.pmi_gap, parts.logps, prior_logps)


def rmipo_loss(
    chosen_logps: Tensor,  # (P,) nats per token
    rejected_logps: Tensor,  # (P,)
    chosen_prior_logps: Tensor,  # (P,)
    rejected_prior_logps: Tensor,  # (P,)
    *,
    beta: float = 2.0,
    gamma_min: float = 0.3,
    gamma_max: float = 1.6,
    gamma_scaled_by_beta: bool = False,
    label_smoothing: float = 0.0,
    impl: Impl = "auto",
) -> LossOutput:
    """RMiPO loss of P pairs from their mean log-probs (arXiv 2604.24804, equation 11).

    Same as, without label smoothing,
    `-logsigmoid(beta * (chosen_logps - rejected_logps) - gamma)` with
    `gamma = gamma_min + (gamma_max - gamma_min) * exp(-max(0, pmi_gap))`, detached, and
    `pmi_gap = (chosen_logps - chosen_prior_logps) - (rejected_logps - rejected_prior_logps)`.
    `gamma_scaled_by_beta=True` is the authors' released code: beta multiplies gamma too.
    Results are float32 (float64 if an input is). NaN in, NaN out: a mean over no token can't be
    told from a broken one here, so the rule for an undefined PMI (gap 0) is `pair_loss`'s.

    Raises:
        ValueError: shapes that aren't (P,), different devices, an option out of its range.
        TypeError: an input that is not floating point.
    """
    named = {
        "chosen_logps": chosen_logps,
        "rejected_logps": rejected_logps,
        "chosen_prior_logps": chosen_prior_logps,
        "rejected_prior_logps": rejected_prior_logps,
    }
    require_dense("rmipo_loss", **named)
    pairs = chosen_logps.shape[0] if chosen_logps.dim() == 1 else None
    dtype = torch.float32
    for name, value in named.items():
        if not value.is_floating_point():
            raise TypeError(f"rmipo_loss: {name} must be floating point, got {value.dtype}")
        if pairs is None or value.shape != (pairs,):
            want = "(num_pairs,)" if pairs is None else f"(num_pairs,) = ({pairs},)"
            raise ValueError(f"rmipo_loss: {name} must have shape {want}, got {tuple(value.shape)}")
        require(
            "rmipo_loss",
            name,
            "be on the device of chosen_logps",
            chosen_logps.device,
            value.device,
        )
        dtype = torch.promote_types(dtype, value.dtype)
    # A mean is the mean of one token: the fused operator serves here too.
    borders = torch.arange(2 * len(chosen_logps) + 1, dtype=torch.int32, device=chosen_logps.device)
    out = pair_loss(
        torch.stack([chosen_logps.to(dtype), rejected_logps.to(dtype)], dim=1).flatten(),
        borders,
        torch.stack(
            [chosen_prior_logps.to(dtype), rejected_prior_logps.to(dtype)], dim=1
        ).flatten(),
        borders,
        beta=beta,
        gamma_min=gamma_min,
        gamma_max=gamma_max,
        gamma_scaled_by_beta=gamma_scaled_by_beta,
        label_smoothing=label_smoothing,
        impl=impl,
    )
    return LossOutput(out.loss, out.gamma, out.pmi_gap)


_Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _plain(p: PairParts) -> _Parts:
    """The unnamed tuple that an operator's schema asks for."""
    return p.loss, p.gamma, p.pmi_gap, p.logps, p.prior_logps, p.mean_grads


@torch.library.custom_op("rmipo_lite::pair_loss", mutates_args=())
def _pair_loss(
    token_logps: Tensor,
    cu_seqlens: Tensor,
    prior_token_logps: Tensor | None,
    prior_cu_seqlens: Tensor | None,
    loss_type: str,
    beta: float,
    gamma_min: float,
    gamma_max: float,
    gamma_scaled_by_beta: bool,
    label_smoothing: float,
    simpo_gamma: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    options = PairOptions(
        loss_type, beta, gamma_min, gamma_max, gamma_scaled_by_beta, label_smoothing, simpo_gamma
    )
    require_memory(
        "pair_loss",
        token_logps=token_logps,
        cu_seqlens=cu_seqlens,
        prior_token_logps=prior_token_logps,
        prior_cu_seqlens=prior_cu_seqlens,
    )
    sequences = (token_logps, cu_seqlens, prior_token_logps, prior_cu_seqlens)
    kernel = loss_named(loss_type).kernel
    use_native = kernel is not None and native.use_native(impl, token_logps.device)
    device = token_logps.device
    if not has_float64(device):
        on_cpu = (None if tensor is None else tensor.cpu() for tensor in sequences)
        parts = _pair_loss(*on_cpu, *options, "torch")
        return tuple(part.to(device) for part in parts)
    if device.type == "cpu":
        check_borders("cu_seqlens", cu_seqlens, token_logps.shape[0], may_be_empty=False)
        if prior_cu_seqlens is not None and prior_token_logps is not None:
            count = prior_token_logps.shape[0]
            check_borders("prior_cu_seqlens", prior_cu_seqlens, count, may_be_empty=True)
    if kernel is not None and use_native:
        return _plain(native.pair_losses(*sequences, options, kernel))
    return _plain(reference.pair_losses(*sequences, options))


@_pair_loss.register_fake
def _(token_logps: Tensor, cu_seqlens: Tensor, *_: Any) -> tuple[Tensor, ...]:
    sequences = cu_seqlens.shape[0] - 1
    per_pair = [token_logps.new_empty(sequences // 2) for _ in range(3)]
    per_sequence = [token_logps.new_empty(sequences) for _ in range(3)]
    return (*per_pair, *per_sequence)


@torch.library.custom_op("rmipo_lite::pair_loss_backward", mutates_args=())
def _pair_loss_backward(
    grad_loss: Tensor, mean_grads: Tensor, cu_seqlens: Tensor, num_tokens: int
) -> Tensor:
    """grad_token = grad_loss[pair] * d loss / d mean[sequence] / tokens in the sequence."""
    # float64: one division and one rounding, as in the forward pass
    grads, means = in_float64(grad_loss), in_float64(mean_grads)
    borders = cu_seqlens.to(grads.device)
    scale = grads.repeat_interleave(2) * means / borders.diff()
    index = reference.sequence_of_token(borders, num_tokens)
    return scale[index].to(mean_grads.dtype).to(mean_grads.device)


@_pair_loss_backward.register_fake
def _(grad_loss: Tensor, mean_grads: Tensor, cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    return mean_grads.new_empty(num_tokens)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(output[5], inputs[1])
    ctx.num_tokens = inputs[0].shape[0]
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad_loss, *_):  # type: ignore[no-untyped-def]
    refuse_second_derivative("pair_loss")
    mean_grads, cu_seqlens = ctx.saved_tensors
    grad = _pair_loss_backward(grad_loss, mean_grads, cu_seqlens, ctx.num_tokens)
    return (grad, *[None] * 11)


_pair_loss.register_autograd(_backward, setup_context=_setup_context)
