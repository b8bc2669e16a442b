"""A model too large for one card, its layers shared out: every process holds a part (FSDP2).

torch's `fully_shard` gathers a layer's weights when it is called and frees them after it; in the
backward pass it gathers them again, adds the processes' gradients up and leaves each its part. So a
pass is a meeting: every process makes as many of them, in the same order.

What stands outside of the layers (embeddings, last norm, head) is whole on every process: the head
is read outside of the model's call, and no gather is paid for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

# On the model itself: whoever passes pairs through it must know.
_SHARDED = "_rmipo_lite_sharded"


def is_sharded(model: nn.Module) -> bool:
    """Whether every process holds a part of this model's layers."""
    return _SHARDED in vars(model)


def shard(
    model: nn.Module,
    backbone: nn.Module,
    layers: Sequence[nn.Module],
    processes: int,
    device_type: str,
) -> None:
    """Leave each process its part of every layer; all call it, with the same weights.

    Packed 4-bit weights that are stored as bytes stay whole.

    Args:
        model: the whole of it.
        backbone: what is called in a pass.
        layers: the modules within it that are shared out.
        processes: how many there are.
        device_type: of the device that each process computes on.
    """
    from torch.distributed.device_mesh import init_device_mesh  # no torch without processes has it
    from torch.distributed.fsdp import fully_shard

    shared = {p for layer in layers for p in layer.parameters() if p.is_floating_point()}
    others = {p for p in backbone.parameters() if p not in shared}
    mesh = init_device_mesh(device_type, (processes,))
    for module in (*layers, backbone):
        part = cast(Any, fully_shard)(
            module, mesh=mesh, reshard_after_forward=True, ignored_params=others
        )
        part.set_gradient_divide_factor(1.0)  # a sum: the loss is divided by all pairs already
        part.set_force_sum_reduction_for_comms(True)
    vars(model)[_SHARDED] = True


def is_part(tensor: Tensor) -> bool:
    """Whether this is a weight or a gradient of which every process holds a part."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """What this process holds of it: all of one that isn't shared out."""
    return cast(Any, tensor).to_local() if is_part(tensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """All of it, on the CPU where it is shared out; every process must ask."""
    return cast(Any, tensor).full_tensor().cpu() if is_part(tensor) else tensor


@torch.no_grad()
def write(parameter: Tensor, weight: Tensor) -> None:
    """Copy a weight, whole or the same part, into one that may be shared out."""
    if is_part(parameter) and not is_part(weight):
        weight = _parted(weight.detach(), parameter)
    parameter.copy_(weight)


def _parted(weight: Tensor, like: Tensor) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    there = cast(Any, like)
    return distribute_tensor(weight.to(there.device), there.device_mesh, there.placements)


@contextmanager
def whole(model: nn.Module, *, everything: bool = False, changed: bool = False) -> Iterator[None]:
    """Inside the block the trained weights of a sharded model are plain tensors on the CPU.

    Every process enters it. With `everything` the frozen ones too, which takes as much memory as
    the model; with `changed` they are written back afterwards. Of another model it does nothing.
    """
    swapped, hooks = [], []
    for module in model.modules() if is_sharded(model) else ():
        # FSDP's own would look for its part of a weight that was just loaded.
        hooks.append((module, module._load_state_dict_post_hooks))
        module._load_state_dict_post_hooks = type(hooks[-1][1])()
        for name, parameter in module.named_parameters(recurse=False):
            if is_part(parameter) and (everything or parameter.requires_grad):
                plain = nn.Parameter(full(parameter.detach()), parameter.requires_grad)
                module._parameters[name] = plain
                swapped.append((module, name, parameter, plain))
    try:
        yield
    finally:
        for module, own in hooks:
            module._load_state_dict_post_hooks = own
        for module, name, parameter, plain in swapped:
            module._parameters[name] = parameter
            if changed:
                write(parameter, plain)


def full_state(state: Any) -> Any:
    """An optimizer's state dict without a shared tensor; every process must ask."""
    if isinstance(state, dict):
        return {key: full_state(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(full_state(value) for value in state)
    return full(state) if isinstance(state, Tensor) else state


def share_state(optimizer: torch.optim.Optimizer) -> None:
    """After it was loaded whole: of each weight's state the part that its weight has here."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items() if is_part(parameter) else ():
            if isinstance(value, Tensor) and value.shape == parameter.shape and not is_part(value):
                state[name] = _parted(value, parameter)
