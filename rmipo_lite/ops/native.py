"""The C++ and CUDA kernels: their schemas, and the calls that take and give tensors.

Which library brings them, and what is in the way where none does, is `library`'s business.
"""

import warnings
from typing import Literal, get_args

import torch
from torch import Tensor

from rmipo_lite.ops.devices import no_kernels
from rmipo_lite.ops.library import notice_fork, status
from rmipo_lite.ops.losses import PairOptions
from rmipo_lite.ops.reference import LogitTransform, PairParts

Impl = Literal["auto", "native", "torch"]

# The kernels' schemas, once for both libraries, which only implement them. `flag` is set to 1
# where an id or a border lies outside its range.
_schemas = torch.library.Library("rmipo_lite", "FRAGMENT")
_schemas.define(
    "row_logps(Tensor(a!) logits, Tensor target_ids, Tensor? bias, float logit_softcap, "
    "float logit_scale, Tensor? row_scale, Tensor(b!) logps, Tensor(c!)? grads, "
    "Tensor(d!) flag) -> ()"
)
# CUDA only: in one read, for a derivative of 16 bits with float32's exponents.
_schemas.define(
    "row_exponentials(Tensor logits, Tensor target_ids, Tensor? bias, float logit_softcap, "
    "float logit_scale, Tensor(a!) logps, Tensor(b!) grads, Tensor(c!) factors, "
    "Tensor(d!) flag) -> ()"
)
# CPU only: a block of columns of some rows, folded into what is known of those rows.
_schemas.define(
    "fold_logits(Tensor(a!) logits, Tensor target_ids, int first_id, Tensor? bias, "
    "float logit_softcap, float logit_scale, Tensor(b!) row_max, Tensor(c!) row_sum, "
    "Tensor(d!) target_logits, Tensor(e!)? directions) -> ()"
)
_schemas.define(
    "pair_losses(Tensor token_logps, Tensor cu_seqlens, Tensor? prior_token_logps, "
    "Tensor? prior_cu_seqlens, int loss_type, float beta, float gamma_min, float gamma_max, "
    "bool gamma_scaled_by_beta, float label_smoothing, float simpo_gamma, Tensor(a!) loss, "
    "Tensor(b!) gamma, Tensor(c!) pmi_gap, Tensor(d!) logps, Tensor(e!) prior_logps, "
    "Tensor(f!) mean_grads, Tensor(g!) flag) -> ()"
)
_flags: dict[torch.device, Tensor] = {}
_warned: set[str] = set()


def device_flag(device: torch.device) -> Tensor:
    """(1,) int32 on `device`: 1 once a kernel met a target or a border outside its range.

    CPU tensors are checked beforehand and raise instead. On a GPU nothing waits for the device, so
    the trainer reads this once per optimizer step, together with the loss, and zeroes it.
    """
    if device not in _flags:
        _flags[device] = torch.zeros(1, dtype=torch.int32, device=device)
    return _flags[device]


def check_impl(op: str, impl: str) -> None:
    """Refuse a word that names no implementation.

    Raises:
        ValueError: not auto, native or torch.
    """
    if impl not in get_args(Impl):
        raise ValueError(f"{op}: impl must be auto, native or torch, got {impl!r}")


def use_native(impl: str, device: torch.device) -> bool:
    """Whether the kernels do the work; warns once where auto has to do without them.

    Where there are none to be had, as on Apple's GPUs, auto says nothing.

    Raises:
        RuntimeError: impl is native and there are none.
    """
    notice_fork()
    if impl == "torch":
        return False
    found = status(device.type)
    if not found.available:
        if impl == "native":
            raise RuntimeError(f"the native extension for {device.type} is missing: {found.reason}")
        if device.type not in _warned and no_kernels(device.type) is None:
            _warned.add(device.type)
            warnings.warn(
                f"rmipo_lite: plain PyTorch does the work on {device.type}, since the native "
                f"extension is missing: {found.reason}",
                stacklevel=3,
            )
    return found.available


def row_logps(
    logits: Tensor,  # (C, V) fp32 | fp64, overwritten
    target_ids: Tensor,  # (C,) int64
    transform: LogitTransform,
    row_scale: Tensor | None,  # (C,)
    grads: Tensor | None,  # (C, V) out; on the CPU the logits themselves
) -> Tensor:
    """Kernel form of `reference.row_logps`; fills `grads` where given."""
    logps = logits.new_empty(logits.shape[0])
    torch.ops.rmipo_lite.row_logps(
        logits,
        target_ids.contiguous(),
        *_numbers_of(transform, logits.dtype),
        None if row_scale is None else row_scale.to(logits.dtype).contiguous(),
        logps,
        grads,
        device_flag(logits.device),
    )
    return logps


def _numbers_of(
    transform: LogitTransform, dtype: torch.dtype
) -> tuple[Tensor | None, float, float]:
    """Bias, softcap and scale as the kernels of whole rows take them."""
    bias = None if transform.bias is None else transform.bias.to(dtype).contiguous()
    return bias, transform.softcap or 0.0, transform.scale


def row_exponentials(
    logits: Tensor,  # (C, V) fp32
    target_ids: Tensor,  # (C,) int64
    transform: LogitTransform,
    grads: Tensor,  # (C, V) bf16 out
) -> tuple[Tensor, Tensor]:
    """Log-probs (C,) and factors (C,): row by row, `grads` times its factor is the derivative."""
    logps, factors = logits.new_empty(logits.shape[0]), logits.new_empty(logits.shape[0])
    torch.ops.rmipo_lite.row_exponentials(
        logits,
        target_ids.contiguous(),
        *_numbers_of(transform, logits.dtype),
        logps,
        grads,
        factors,
        device_flag(logits.device),
    )
    return logps, factors


def fold_logits(
    logits: Tensor,  # (C, B) fp32 | fp64 | bf16; with directions overwritten by exponentials
    target_ids: Tensor,  # (C,) int64
    first_id: int,  # token of column 0
    transform: LogitTransform,  # its bias (B,) that of these columns
    row_max: Tensor,  # (C,) updated
    row_sum: Tensor,  # (C,) fp64, updated: exp(logit - max) over every token but the target
    target_logits: Tensor,  # (C,) set where the target is among these columns
    directions: Tensor | None,  # (C, H) scaled by exp(old max - new max)
) -> None:
    """Fold a block of columns into running maxima and sums; see `head_blocks`."""
    torch.ops.rmipo_lite.fold_logits(
        logits,
        target_ids,
        first_id,
        transform.bias,
        transform.softcap or 0.0,
        transform.scale,
        row_max,
        row_sum,
        target_logits,
        directions,
    )


def pair_losses(
    token_logps: Tensor,
    cu_seqlens: Tensor,
    prior_token_logps: Tensor | None,
    prior_cu_seqlens: Tensor | None,
    options: PairOptions,
    kernel: int,  # the loss's number in csrc/pair_math.h
) -> PairParts:
    """Kernel form of `reference.pair_losses`."""
    sequences = cu_seqlens.shape[0] - 1
    sizes = [sequences // 2] * 3 + [sequences] * 3
    parts = PairParts(*(token_logps.new_empty(size) for size in sizes))
    torch.ops.rmipo_lite.pair_losses(
        token_logps.contiguous(),
        cu_seqlens.contiguous(),
        None if prior_token_logps is None else prior_token_logps.contiguous(),
        None if prior_cu_seqlens is None else prior_cu_seqlens.contiguous(),
        kernel,
        *options[1:],
        *parts,
        device_flag(token_logps.device),
    )
    return parts
