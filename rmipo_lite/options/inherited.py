"""transformers' own options, each in one of three classes: checked, refused, or passed on.

A value that transformers takes without a look ends in the middle of a run (batch size 0), or does
something else than it says (`max_steps=0` trains an epoch). An option that nothing here reads would
be ignored without a word. Both are errors that name the option, before anything is loaded.
"""

import inspect
import math
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import SchedulerType
from transformers.training_args import trainer_log_levels
from transformers.utils.import_utils import is_liger_kernel_available


class Wanted(NamedTuple):
    """What a value must be, in words and as a test of a value of the right type, None left out."""

    words: str
    holds: Callable[[Any], bool]


def _whole(least: int) -> Wanted:
    return Wanted(f"a whole number >= {least}", lambda value: value >= least)


def _finite(words: str, holds: Callable[[Any], bool]) -> Wanted:
    return Wanted(words, lambda value: math.isfinite(value) and holds(value))


def _one_of(names: list[str]) -> Wanted:
    return Wanted("one of " + ", ".join(names), lambda value: value in names)


_TRACKERS = {"none", "all", *INTEGRATION_TO_CALLBACK}
_POSITIVE = _finite("a number > 0", lambda value: value > 0)
_NOT_NEGATIVE = _finite("a number >= 0", lambda value: value >= 0)
_RATE = Wanted(
    "'auto' or a number >= 0",
    lambda value: value == "auto" or (not isinstance(value, str) and _NOT_NEGATIVE.holds(value)),
)
_SHARE = _finite("in [0, 1)", lambda value: 0 <= value < 1)
_SEED = Wanted("a whole number in [0, 2^32)", lambda value: 0 <= value < 2**32)

CHECKED: dict[str, Wanted] = {
    "num_train_epochs": _POSITIVE,
    "max_steps": Wanted("-1 (whole epochs) or >= 1", lambda value: value == -1 or value >= 1),
    "per_device_train_batch_size": _whole(1),
    "per_device_eval_batch_size": _whole(1),
    "gradient_accumulation_steps": _whole(1),
    "learning_rate": _RATE,
    "lr_scheduler_type": _one_of([str(kind.value) for kind in SchedulerType]),
    "warmup_steps": _NOT_NEGATIVE,
    "weight_decay": _NOT_NEGATIVE,
    "adam_beta1": _SHARE,
    "adam_beta2": _SHARE,
    "adam_epsilon": _POSITIVE,
    "max_grad_norm": Wanted("a number >= 0 (0: no clipping)", lambda value: value >= 0),
    "neftune_noise_alpha": _NOT_NEGATIVE,
    "torch_empty_cache_steps": _whole(1),
    "logging_steps": _POSITIVE,
    "eval_steps": _POSITIVE,
    "eval_delay": _NOT_NEGATIVE,
    "save_steps": _POSITIVE,
    "save_total_limit": Wanted(">= 1, or None to keep all", lambda value: value >= 1),
    "seed": _SEED,
    "data_seed": _SEED,
    "dataloader_num_workers": _whole(0),
    "dataloader_prefetch_factor": _whole(1),
    "eval_accumulation_steps": _whole(1),
    "ddp_bucket_cap_mb": _whole(1),
    "ddp_timeout": _whole(1),
    "log_level": _one_of(list(trainer_log_levels)),
    "log_level_replica": _one_of(list(trainer_log_levels)),
    "train_sampling_strategy": _one_of(["random", "sequential", "group_by_length"]),
    "dataloader_multiprocessing_context": _one_of(["fork", "spawn", "forkserver"]),
    "report_to": Wanted(
        f"none, all or some of {', '.join(INTEGRATION_TO_CALLBACK)}",
        lambda value: set([value] if isinstance(value, str) else value) <= _TRACKERS,
    ),
}

_NO_DEEPSPEED = (
    "not supported; a model that fits one card: accelerate launch --multi_gpu, a larger one: "
    "FSDP2, rmipo-lite train --accelerate_config fsdp2"
)

# name -> (the values that may stand there, where else what is meant is to be had)
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "remove_unused_columns": ((False,), "the batch is ours"),
    "logging_nan_inf_filter": ((False,), "it shows losses that are not finite as healthy ones"),
    "label_smoothing_factor": ((0,), "label_smoothing is the option of these losses"),
    "label_names": ((None,), "a pair has no labels"),
    "length_column_name": (("length",), "lengths are counted in tokens"),
    "include_for_metrics": (([],), "no logits are held"),
    "batch_eval_metrics": ((False,), "no logits are held"),
    "bf16_full_eval": ((False,), "an evaluation runs as training does; bf16 is the option"),
    "fp16_full_eval": ((False,), "an evaluation runs as training does; fp16 is the option"),
    "include_num_input_tokens_seen": (("no", False), "num_tokens is logged as it is"),
    "auto_find_batch_size": ((False,), "max_tokens_per_microstep makes room by itself"),
    "torch_compile": ((False,), "packed batches go past a compiled forward"),
    "torch_compile_backend": ((None,), "packed batches go past a compiled forward"),
    "torch_compile_mode": ((None,), "packed batches go past a compiled forward"),
    "enable_jit_checkpoint": ((False,), "save_steps writes checkpoints that are whole at any time"),
    "deepspeed": ((None, ""), _NO_DEEPSPEED),
    "resume_from_checkpoint": (
        (None,), "pass resume= to train(), or resume_from_checkpoint= to trainer.train()"
    ),
}  # fmt: skip

# What an option that says something needs in the others, as words and as a test of all options.
_NEEDS: dict[str, Wanted] = {
    "save_strategy": Wanted(
        "eval_strategy 'steps' or 'epoch': the best is found by an evaluation",
        lambda options: options["save_strategy"] != "best" or options["eval_strategy"] != "no",
    ),
    "optim_target_modules": Wanted(
        "an optim of GaLore or APOLLO: no other reads it",
        lambda options: any(
            kind in getattr(options["optim"], "value", options["optim"])
            for kind in ("galore", "apollo")
        ),
    ),
    "use_liger_kernel": Wanted(
        "the package liger-kernel: pip install liger-kernel",
        lambda options: is_liger_kernel_available(),
    ),
    "liger_kernel_config": Wanted(
        "use_liger_kernel=True", lambda options: options["use_liger_kernel"]
    ),
    **dict.fromkeys(
        ("dataloader_persistent_workers", "dataloader_prefetch_factor"),
        Wanted(
            "dataloader_num_workers >= 1", lambda options: options["dataloader_num_workers"] > 0
        ),
    ),
}

# Of accelerator_config: they cut or gather batches.
_OF_BATCHES = ("split_batches", "dispatch_batches", "gradient_accumulation_kwargs")

# Passed on as they came: transformers reads them and nothing here stands in the way, or (the last
# three) they shape predictions, which no evaluation here holds.
PASSED = frozenset([
    "output_dir", "lr_scheduler_kwargs", "optim", "optim_args", "optim_target_modules", "tf32",
    "bf16", "fp16", "use_cpu", "average_tokens_across_devices", "activation_checkpointing",
    "activation_checkpointing_kwargs", "gradient_checkpointing",
    "gradient_checkpointing_kwargs", "use_liger_kernel", "liger_kernel_config", "use_cache",
    "logging_strategy", "logging_first_step", "log_on_each_node", "disable_tqdm", "run_name",
    "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id",
    "eval_strategy", "eval_on_start", "save_only_model", "save_strategy", "save_on_each_node",
    "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy",
    "hub_always_push", "hub_revision", "load_best_model_at_end", "metric_for_best_model",
    "greater_is_better", "ignore_data_skip", "full_determinism", "debug",
    "restore_callback_states_from_checkpoint", "accelerator_config", "parallelism_config",
    "fsdp", "fsdp_config", "dataloader_drop_last", "dataloader_persistent_workers",
    "dataloader_pin_memory", "dataloader_in_order", "ddp_find_unused_parameters",
    "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend", "skip_memory_metrics",
    "do_train", "do_eval", "do_predict", "local_rank", "prediction_loss_only",
    "eval_do_concat_batches", "eval_use_gather_object",
])  # fmt: skip


def problem(options: Mapping[str, Any]) -> str | None:
    """What is wrong with the first option that can't stand, as "NAME must be ..., got ..."."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("1", "true", "yes"):
        return f"deepspeed must be left out of the launcher's file ({_NO_DEEPSPEED})"
    for name, value in options.items():
        if name in REFUSED:
            allowed, instead = REFUSED[name]
            if value not in allowed:
                return f"{name} must be {allowed[0]!r} ({instead}), got {value!r}"
        elif name in CHECKED and value is not None and not CHECKED[name].holds(value):
            return f"{name} must be {CHECKED[name].words}, got {value!r}"
    for name, needs in _NEEDS.items():
        if options[name] and not needs.holds(options):
            return f"{name}={options[name]!r} needs {needs.words}"
    return None


def schedule_problem(rate: object, schedule: Any) -> str | None:
    """What is wrong with `lr_scheduler_kwargs` where the rate isn't known yet."""
    for name in ("min_lr", "lr_end"):
        if rate == "auto" and isinstance(schedule, dict) and schedule.get(name):
            return (
                f"lr_scheduler_kwargs must be without {name} (a rate of its own) while "
                f"learning_rate='auto' is still to be found: min_lr_rate is a share of it; got "
                f"{schedule!r}"
            )
    return None


def parsed_problem(accelerator: Any, checkpointing: Any) -> str | None:
    """The same of `accelerator_config` and `gradient_checkpointing_kwargs`, JSON texts read."""
    for name in _OF_BATCHES:
        if value := getattr(accelerator, name):
            return f"accelerator_config: {name} must be left out (the batch is ours), got {value!r}"
    known = _checkpointing_options()
    if checkpointing is not None and not (
        isinstance(checkpointing, dict) and known.issuperset(checkpointing)
    ):
        shown = ", ".join(sorted(known))
        return f"gradient_checkpointing_kwargs must be a dict of {shown}, got {checkpointing!r}"
    return None


def _checkpointing_options() -> set[str]:
    """Those of torch's `checkpoint`, and what transformers takes beside them since 5.24."""
    enable = getattr(PreTrainedModel, "activation_checkpointing_enable", None)
    also = [] if enable is None else list(inspect.signature(enable).parameters)[2:]
    known = {"preserve_rng_state", *also, *inspect.signature(checkpoint).parameters}
    return known - {"function", "args", "kwargs"}
