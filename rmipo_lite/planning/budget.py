"""How many tokens go through the model at once: `max_tokens_per_microstep="auto"`.

The head never holds logits, so what a micro-step costs is its activations. They are counted from
the model's config (footprint.py); where the count errs all the same, `step.py` halves the budget
and repeats the step. A pass without gradients keeps nothing and may be longer. Checkpointing costs
a second forward pass, so that only the micro-steps that would not fit without have it, in as many
layers as they need.
"""

import math
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
    activations_without_gradient,
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
class Checkpointing:
    """In how many layers a micro-step computes activations again in the backward pass.

    They are the model's first ones: when the backward pass comes to them, what the others kept is
    gone, so that what is between no layer and all of them takes no more than its share of both.

    Attributes:
        layers: of the model.
        kept, again: what a micro-step takes without checkpointing, and with it in every layer.
        room: bytes that a micro-step may take.
        asked: whether all do or none does; None: as many as its tokens need.
    """

    layers: int
    kept: Activations
    again: Activations
    room: float
    asked: bool | None

    def layers_of(self, tokens: float) -> int:
        """Layers of a micro-step of so many tokens."""
        if self.asked is not None:
            return self.layers * self.asked
        over = self.kept.bytes_of(tokens) - self.room
        saved = self.kept.bytes_of(tokens) - self.again.bytes_of(tokens)
        if over <= 0 or saved <= 0:
            return 0
        return min(self.layers, math.ceil(self.layers * over / saved))

    def bytes_of(self, tokens: float) -> float:
        """Peak bytes of a micro-step of so many tokens."""
        share = self.layers_of(tokens) / self.layers
        return (1 - share) * self.kept.bytes_of(tokens) + share * self.again.bytes_of(tokens)

    @property
    def least(self) -> Activations:
        """What a micro-step takes at least: with every layer computed again, where one may be."""
        return self.kept if self.asked is False else self.again


@dataclass(frozen=True)
class MicroStepPlan:
    """What a micro-step may hold, and what it computes again in the backward pass.

    Attributes:
        max_tokens: of a micro-step of several pairs.
        max_tokens_no_grad: of a pass without gradients.
        checkpointing: by a micro-step's tokens.
    """

    max_tokens: int
    max_tokens_no_grad: int
    checkpointing: Checkpointing


def plan_micro_steps(
    model: nn.Module, args: RMiPOConfig, longest: int, processes: int = 1
) -> MicroStepPlan:
    """Resolve `max_tokens_per_microstep` and, where it is left open, checkpointing.

    `longest` is what the longest pair takes alone, tokens: a pair can't be cut. `processes` are
    those of this machine that plan alike; a card is one's own, the CPU's memory is shared.
    """
    device = device_of(model)
    return choose_budget(
        causal_lm(model).config,
        setup_of(model, args.dtype),
        device.type,
        free=min(map(free_bytes, devices_of(model))) / (processes if device.type == "cpu" else 1)
        - fixed_bytes(model, args),
        longest=longest,
        args=args,
        may_checkpoint=can_checkpoint(model),
        is_sharded=bool(args.shards_layers),
    )


def choose_budget(
    config: PretrainedConfig,
    setup: Setup,
    device_type: str,
    *,
    free: float,
    longest: int,
    args: RMiPOConfig,
    may_checkpoint: bool = True,
    is_sharded: bool = False,
) -> MicroStepPlan:
    """The same for a model that need not be there.

    Args:
        config, setup, device_type: of the model, the run and where it is.
        free: bytes left beside the weights and what a step takes whatever its tokens.
        longest: tokens of the longest pair.
        may_checkpoint: whether the architecture can.
        is_sharded: whether processes meet in every layer, and have to compute again alike.
    """
    room = max(0.0, _ACTIVATIONS_SHARE * free)
    kept = activations_on(device_type, config, setup, False, longest)
    most = _MOST if device_type == "cuda" else _MOST_ON_CPU
    wanted = args.max_tokens_per_microstep
    largest = longest
    if isinstance(wanted, int):  # a step may not have so many
        largest = max(longest, min(wanted, args.pairs_per_step * longest))
    asked: bool | None = args.wants_checkpointing
    is_open = args.checkpointing_is_open and may_checkpoint
    if is_open and largest > kept.tokens_in(room):
        asked = True if is_sharded else None
    again = kept  # counted only where it is wanted: a count takes its time
    if asked is not False:
        again = activations_on(device_type, config, setup, True, longest)
    layers = int(config.get_text_config().num_hidden_layers)
    checkpointing = Checkpointing(layers, kept, again, room, asked)
    if isinstance(wanted, int):
        return MicroStepPlan(wanted, wanted, checkpointing)
    # Where nothing more is to be had, memory that is short is tried: the count may err.
    least = 1 if is_open and not asked else _LEAST
    fits = freely = min(max((again if asked else kept).tokens_in(room), least), most)
    if fits < most:
        passed = activations_without_gradient(config, setup)
        passed = _with_scores(passed, device_type, config, True, longest)
        freely = min(max(passed.tokens_in(room), fits), most)
    return MicroStepPlan(fits, freely, checkpointing)


def activations_on(
    device_type: str, config: PretrainedConfig, setup: Setup, checkpointing: bool, longest: int
) -> Activations:
    """What micro-steps take on a kind of device; `longest` as for `plan_micro_steps`."""
    found = activations_of(config, setup, checkpointing)
    return _with_scores(found, device_type, config, checkpointing, longest)


def _with_scores(
    found: Activations, device_type: str, config: PretrainedConfig, few: bool, longest: int
) -> Activations:
    """With the scores that attention keeps where it isn't a fused one, of `few` layers or all."""
    if is_trusted(device_type):
        return found
    return replace(found, per_token=found.per_token + score_bytes(config, longest, few))


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
