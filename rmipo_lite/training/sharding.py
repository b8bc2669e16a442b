"""Whether a run shares the model's layers out (FSDP2), as an option or a launcher's file says.

transformers and accelerate read the same option and the same environment, and would share the model
out in their own way, in which a pass outside of the model's own call finds no weights. So they
don't get to see it.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from torch import nn

from rmipo_lite.adapters.base_model import causal_lm
from rmipo_lite.adapters.start import changes_base
from rmipo_lite.config import RMiPOConfig
from rmipo_lite.model.backbone import device_of, devices_of, is_spread
from rmipo_lite.output.console import say
from rmipo_lite.parallel.group import Group
from rmipo_lite.parallel.sharded import is_sharded, shard

_LAUNCHED = "ACCELERATE_USE_FSDP"
# Optimizers that take weights of which a process holds a part: torch's own, element by element.
_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "rmsprop", "adagrad")


def decide_sharding(args: RMiPOConfig) -> None:
    """Set `args.shards_layers`, once, and say what follows from it.

    Raises:
        ValueError: FSDP as it isn't done here; the message says what is.
    """
    if args.shards_layers is None:
        args.shards_layers = _is_asked(args)


def _is_asked(args: RMiPOConfig) -> bool:
    if not (args.fsdp or _is_set(_LAUNCHED)):
        return False
    if Group.current().size == 1:
        say("fsdp: one process has nobody to share the model with")
        return False
    options: dict[str, Any] = args.fsdp_config if isinstance(args.fsdp_config, dict) else {}
    if options.get("activation_checkpointing") or _is_set("FSDP_ACTIVATION_CHECKPOINTING"):
        args.gradient_checkpointing = True
    if args.half_is_open:
        say("fsdp: in float32, since float16's scaler doesn't know weights in parts")
        args.take_float32()
    _refuse_other_forms(args, options)
    return True


def _refuse_other_forms(args: RMiPOConfig, options: dict[str, Any]) -> None:
    if args.fsdp:
        version, offload = options.get("version", 2), options.get("cpu_offload", False)
    else:
        version, offload = os.environ.get("FSDP_VERSION", "1"), _is_set("FSDP_OFFLOAD_PARAMS")
    if int(version) != 2:
        raise ValueError(
            f"fsdp: version {version} is not supported, version 2 is: --accelerate_config fsdp2, "
            "or fsdp_version: 2 in the file (docs/scale.md has one that works)"
        )
    optimizer = str(getattr(args.optim, "value", args.optim))
    for is_wrong, what in (
        (offload, "offloading weights to the CPU is not supported"),
        (args.fp16, "fp16=True is not supported; bf16=True or float32 are"),
        (args.ref_sync_steps, "a reference that moves (ref_sync_steps) is not supported"),
        (optimizer not in _OPTIMIZERS, f"optim={optimizer!r} wants whole weights; adamw_torch"),
    ):
        if is_wrong:
            raise ValueError(f"fsdp: {what}")


def refuse_parts(model: nn.Module) -> None:
    """Raise ValueError for a model in parts that nobody can put together here.

    Layers that an earlier run has shared out, weights that are offloaded, and layers on several
    devices in one of several processes.
    """
    if is_sharded(model):
        raise ValueError(
            "model: its layers are shared out among processes (FSDP2) by an earlier run; load the "
            "folder that this saved, and go on with that"
        )
    device_of(model)  # says which weights are nowhere that they can be trained
    if is_spread(model) and Group.current().size > 1:
        raise ValueError(
            f"model: its layers are on {len(devices_of(model))} devices (device_map), and several "
            "processes share every step: one or the other. FSDP2 does both "
            "(--accelerate_config fsdp2)"
        )


def share_out(model: nn.Module, args: RMiPOConfig, group: Group) -> None:
    """Leave each process its part of the model's layers, where that was asked for.

    Raises:
        ValueError: its adapter can't be shared out, or its layers aren't known.
    """
    if not args.shards_layers:
        return
    if isinstance(model, PeftModel) and changes_base(model.active_peft_config):
        kind = getattr(model.active_peft_config, "init_lora_weights", None)
        raise ValueError(f"fsdp: an adapter that starts as {kind!r} is not supported")
    base = causal_lm(model)
    backbone = getattr(base, base.base_model_prefix)
    shard(model, backbone, _layers_of(base, backbone), group.size, args.device.type)
    if not hasattr(model, "hf_quantizer"):
        model.to(args.device)
    say(f"{group.size} processes hold a part of every layer each (FSDP2)")


def _layers_of(base: Any, backbone: nn.Module) -> list[nn.Module]:
    """The blocks that transformers would not split over devices either."""
    names = set(getattr(base, "_no_split_modules", None) or ())
    layers = [module for module in backbone.modules() if type(module).__name__ in names]
    if not layers:
        raise ValueError(
            f"fsdp: which modules of {type(base).__name__} are its layers is not known (it names "
            "no _no_split_modules); plain data parallel takes it: accelerate launch --multi_gpu"
        )
    return layers


@contextmanager
def seen_by_us_alone(args: Any) -> Iterator[None]:
    """Inside the block neither option nor environment asks for FSDP."""
    environment = os.environ.pop(_LAUNCHED, None)
    options = args.fsdp, args.fsdp_plugin_args
    args.fsdp = args.fsdp_plugin_args = None
    try:
        yield
    finally:
        args.fsdp, args.fsdp_plugin_args = options
        if environment is not None:
            os.environ[_LAUNCHED] = environment


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true", "yes")
