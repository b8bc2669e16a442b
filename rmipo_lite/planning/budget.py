"""How many tokens go through the model at once: `max_tokens_per_microstep="auto"`.

The head never holds logits, so what a micro-step costs is its activations. They are counted from
the model's config (footprint.py); where the count errs all the same, `step.py` halves the budget
and repeats the step. Checkpointing is a last resort: it costs a second forward pass, and goes on
where the longest pair would not fit without.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn
from transformers import PretrainedConfig

from rmipo_lite.adapters.base_model import causal_lm
from rmipo_lite.config import RMiPOConfig
from rmipo_lite.model.backbone import can_checkpoint, device_of, devices_of
from rmipo_lite.model.head import read_head
from rmipo_lite.ops import head_buffer_bytes
from rmipo_lite.ops.devices import is_trusted
from rmipo_lite.ops.native import use_native
from rmipo_lite.parallel.sharded import local
from rmipo_lite.planning.device import free_bytes
from rmipo_lite.planning.footprint import (
    Activations,
    Setup,
    activations_of,
    optimizer_width,
    score_bytes,
    setup_of,
)

# On the CPU larger micro-steps stop paying once the matrix products are long enough.
_MOST_ON_CPU = 4096
_LEAST, _MOST = 512, 32768
# Of the free memory; the rest is for fragmentation and what other programs will want.
_ACTIVATIONS_SHARE = 0.6
_TEXTS = (
    "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED",
    "HIP error: out of memory", "HIPBLAS_STATUS_ALLOC_FAILED",
    "UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY", "UR_RESULT_ERROR_OUT_OF_HOST_MEMORY",  # Intel's
    "MPS backend out of memory", "Invalid buffer size",  # Apple's; the latter of one tensor
)  # fmt: skip


@dataclass(frozen=True)
class MicroStepPlan:
    """What a micro-step may hold, and whether activations are computed again in backward."""

    max_tokens: int
    checkpointing: bool


def plan_micro_steps(
    model: nn.Module, args: RMiPOConfig, longest: int, processes: int = 1
) -> MicroStepPlan:
    """Resolve `max_tokens_per_microstep` and, where it is left open, checkpointing.

    `longest` is what the longest pair takes alone, tokens: a pair can't be cut. `processes` are
    those of this machine that plan alike; a card is one's own, the CPU's memory is shared.
    """
    device = device_of(model)
    return choose_budget(
        lambda checkpointing: activations(model, args, checkpointing, longest),
        free=min(map(free_bytes, devices_of(model))) / (processes if device.type == "cpu" else 1)
        - fixed_bytes(model, args),
        longest=longest,
        args=args,
        on_cuda=device.type == "cuda",
        may_checkpoint=can_checkpoint(model),
    )


def choose_budget(
    activations: Callable[[bool], Activations],
    *,
    free: float,
    longest: int,
    args: RMiPOConfig,
    on_cuda: bool,
    may_checkpoint: bool = True,
) -> MicroStepPlan:
    """The same for a model that need not be there.

    Args:
        activations: of a micro-step, by whether they are computed again.
        free: bytes left beside the weights and what a step takes whatever its tokens.
        longest: tokens of the longest pair.
    """
    room = max(0.0, _ACTIVATIONS_SHARE * free)
    asked = args.max_tokens_per_microstep
    checkpointing = args.wants_checkpointing
    if args.checkpointing_is_open and may_checkpoint:
        checkpointing = longest > activations(False).tokens_in(room)
    if isinstance(asked, int):
        return MicroStepPlan(asked, checkpointing)
    fits = activations(checkpointing).tokens_in(room)
    return MicroStepPlan(min(max(fits, _LEAST), _MOST if on_cuda else _MOST_ON_CPU), checkpointing)


def activations(
    model: nn.Module, args: RMiPOConfig, checkpointing: bool, longest: int = 0
) -> Activations:
    """What a loaded model's micro-steps take; `longest` as for `plan_micro_steps`."""
    config, setup = causal_lm(model).config, setup_of(model, args.dtype)
    return activations_on(device_of(model).type, config, setup, checkpointing, longest)


def activations_on(
    device_type: str, config: PretrainedConfig, setup: Setup, checkpointing: bool, longest: int
) -> Activations:
    """The same for a model that need not be there, on a kind of device."""
    found = activations_of(config, setup, checkpointing)
    if is_trusted(device_type):  # fused attention, which keeps no scores for the backward pass
        return found
    scores = score_bytes(config, longest, checkpointing)
    return replace(found, per_token=found.per_token + scores)


def fixed_bytes(model: nn.Module, args: RMiPOConfig) -> int:
    """What a step takes whatever its tokens: gradients, optimizer, the head's buffer."""
    width = optimizer_width(str(getattr(args.optim, "value", args.optim)))
    trained = sum(
        local(p).numel() * (p.element_size() + width) for p in model.parameters() if p.requires_grad
    )
    weight = read_head(model).weight
    native = use_native(args.kernel_impl, weight.device)
    return trained + head_buffer_bytes(weight, native)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the device's memory ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if not isinstance(error, RuntimeError):
        return False
    text = str(error)
    if "CUDNN_STATUS_NOT_SUPPORTED" in text:  # accelerate counts it; a smaller step won't cure it
        return False
    return should_reduce_batch_size(error) or any(words in text for words in _TEXTS)
