"""Optimizer and schedule of a resumed run: as saved, with the options that changed since.

Without a change both are loaded to the last bit. With one, the optimizer keeps its moments and
takes the new numbers, and the new schedule is run forward to the step that was reached.
"""

import warnings
from collections.abc import Mapping
from typing import Any

from rmipo_lite.output.console import say

_NUMBERS = ("lr", "initial_lr", "betas", "eps", "weight_decay", "momentum")
_OF_OPTIMIZER = {
    "optim", "optim_args", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2",
    "adam_epsilon",
}  # fmt: skip
_OF_SCHEDULE = {
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_steps",
    "num_train_epochs", "per_device_train_batch_size", "dataloader_drop_last", "optim",
}  # fmt: skip
_SAME_STATE = ("adamw_torch", "adamw_torch_fused")  # AdamW's two forms have the same moments


def load_optimizer(optimizer: Any, stored: dict[str, Any], changed: Mapping[str, Any]) -> None:
    """Load the saved state; a state that doesn't fit is left out, and one line says so."""
    if not _OF_OPTIMIZER & changed.keys():
        optimizer.load_state_dict(stored)
        return
    own = optimizer.state_dict()
    kinds = changed.get("optim", ("adamw_torch", "adamw_torch"))
    sizes = [[len(group["params"]) for group in state["param_groups"]] for state in (own, stored)]
    if not all(kind in _SAME_STATE for kind in kinds) and kinds[0] != kinds[1]:
        say(f"The optimizer's state is of {kinds[0]} and begins anew with {kinds[1]}")
        return
    if sizes[0] != sizes[1]:
        say("The optimizer's state is of other groups of weights, and begins anew")
        return
    groups = [
        {**there, **{name: here[name] for name in _NUMBERS if name in here}}
        for there, here in zip(stored["param_groups"], own["param_groups"], strict=True)
    ]
    optimizer.load_state_dict({"state": stored["state"], "param_groups": groups})


def load_schedule(
    scheduler: Any, stored: dict[str, Any], changed: Mapping[str, Any], step: int
) -> None:
    """Load the saved schedule, or run the new one forward to the step."""
    if not _OF_SCHEDULE & changed.keys():
        scheduler.load_state_dict(stored)
        return
    inner = getattr(scheduler, "scheduler", scheduler)
    if not hasattr(inner, "lr_lambdas"):  # one that follows a metric: its own state, if it has one
        if "lr_scheduler_type" not in changed:
            scheduler.load_state_dict(stored)
        return
    with warnings.catch_warnings():  # that no optimizer's step came before
        warnings.simplefilter("ignore")
        for _ in range(step):
            inner.step()
