"""How many tokens go through the model at once: `max_tokens_per_microstep="auto"`.

The head never holds logits, so what a micro-step costs is its activations. They are counted from
the model's config (footprint.py); where the count errs all the same, `step.py` halves the budget
and repeats the step. Checkpointing is a last resort: it costs a second forward pass, and goes on
where the longest pair would not fit without.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn

from rmipo_lite.adapters.base_model import causal_lm
from rmipo_lite.config import RMiPOConfig
from rmipo_lite.model.backbone import can_checkpoint, device_of
from rmipo_lite.model.head import read_head
from rmipo_lite.ops import head_buffer_bytes
from rmipo_lite.planning.device import free_bytes
from rmipo_lite.planning.footprint import Activations, activations_of, optimizer_width, setup_of

# On the CPU larger micro-steps stop paying once the matrix products are long enough.
_MOST_ON_CPU = 4096
_LEAST, _MOST = 512, 32768
# Of the free memory; the rest is for fragmentation and what other programs will want.
_ACTIVATIONS_SHARE = 0.6
_CUDA_TEXTS = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


@dataclass(frozen=True)
class MicroStepPlan:
    """What a micro-step may hold, and whether activations are computed again in backward."""

    max_tokens: int
    checkpointing: bool


def plan_micro_steps(model: nn.Module, args: RMiPOConfig, longest: int) -> MicroStepPlan:
    """Resolve `max_tokens_per_microstep` and, where it is left open, checkpointing.

    `longest` is what the longest pair takes alone, tokens: a pair can't be cut.
    """
    device = device_of(model)
    return choose_budget(
        lambda checkpointing: activations(model, args, checkpointing),
        free=free_bytes(device) - fixed_bytes(model, args),
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


def activations(model: nn.Module, args: RMiPOConfig, checkpointing: bool) -> Activations:
    """What a loaded model's micro-steps take."""
    setup = setup_of(model, args.dtype)
    return activations_of(causal_lm(model).config, setup, checkpointing)


def fixed_bytes(model: nn.Module, args: RMiPOConfig) -> int:
    """What a step takes whatever its tokens: gradients, optimizer, the head's buffer."""
    width = optimizer_width(str(getattr(args.optim, "value", args.optim)))
    trained = sum(
        p.numel() * (p.element_size() + width) for p in model.parameters() if p.requires_grad
    )
    return trained + head_buffer_bytes(read_head(model).weight)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the device's memory ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if not isinstance(error, RuntimeError):
        return False
    text = str(error)
    if "CUDNN_STATUS_NOT_SUPPORTED" in text:  # accelerate counts it; a smaller step won't cure it
        return False
    return should_reduce_batch_size(error) or any(words in text for words in _CUDA_TEXTS)
