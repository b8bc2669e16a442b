"""What the package leans on of other packages without their promise, so that a change is a name.

Private names move between versions, and what breaks then is a stack somewhere inside a run. Here
each stands once with its user; `missing` is asked before a trainer is made and by
`rmipo_lite.info()`. Known to hold: torch 2.11 to 2.13, transformers 5.17 to 5.24, accelerate 1.15,
peft 0.21.
"""

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from typing import NamedTuple


class Borrowed(NamedTuple):
    """A private name: where it is, and which of our files leans on it."""

    module: str
    name: str  # dotted, inside the module
    user: str

    @property
    def path(self) -> str:
        """The whole dotted name."""
        return f"{self.module}.{self.name}"


_TRAINER_HOOKS = (
    "_save_checkpoint", "_load_from_checkpoint", "_load_best_model", "_save", "_save_rng_state",
    "_load_rng_state", "_save_optimizer_and_scheduler", "_load_optimizer_and_scheduler",
    "_save_scaler", "_load_scaler", "_push_from_checkpoint", "_finalize_training",
)  # fmt: skip

_OF_EVALUATION = ("_get_dataloader", "_get_eval_sampler")
_OF_TRAINING = ("_get_train_sampler", "_determine_best_metric")

BORROWED: tuple[Borrowed, ...] = (
    *(
        Borrowed("transformers", f"Trainer.{hook}", "checkpoints/trainer_mixin.py")
        for hook in _TRAINER_HOOKS
    ),
    *(
        Borrowed("transformers", f"Trainer.{hook}", "training/evaluation.py")
        for hook in _OF_EVALUATION
    ),
    *(Borrowed("transformers", f"Trainer.{hook}", "training/trainer.py") for hook in _OF_TRAINING),
    Borrowed("transformers", "Trainer._init_training_state", "training/resume.py"),
    Borrowed(
        "peft.tuners.tuners_utils",
        "BaseTuner._mark_only_adapters_as_trainable",
        "adapters/attach.py",
    ),
    Borrowed("peft.utils.other", "AuxiliaryTrainingWrapper", "adapters/embeddings.py"),
    Borrowed("transformers.trainer", "DEFAULT_PROGRESS_CALLBACK", "watch/progress.py"),
    Borrowed("transformers.trainer_callback", "ExportableState", "checkpoints/trainer_mixin.py"),
    Borrowed("transformers.utils.hub", "PushInProgress", "checkpoints/trainer_mixin.py"),
    Borrowed("transformers", "PretrainedConfig._attn_implementation", "model/attention.py"),
    Borrowed("torch", "_C._dispatch_has_kernel_for_dispatch_key", "ops/library.py"),
    Borrowed("torch", "UntypedStorage._cdata", "planning/footprint.py"),
    Borrowed("torch.utils._python_dispatch", "TorchDispatchMode", "planning/footprint.py"),
    Borrowed("torch.utils._pytree", "tree_iter", "planning/footprint.py"),
)
# Set on an object while it is used, so nothing to be asked for before: accelerate's
# `model._original_forward`, transformers' `_require_grads_hook` and `_gradient_checkpointing_func`
# (training/restore.py, model/backbone.py), `_forward_hooks` and the like of torch's modules
# (training/restore.py, model/fused_lora.py). A test makes such objects.


def missing() -> list[str]:
    """What isn't there any more, a line each; empty where all is well."""
    return [
        f"{borrowed.path} is gone, which {borrowed.user} leans on"
        for borrowed in BORROWED
        if not _is_there(borrowed)
    ]


def _is_there(borrowed: Borrowed) -> bool:
    try:
        reduce(getattr, borrowed.name.split("."), importlib.import_module(borrowed.module))
    except (ImportError, AttributeError):
        return False
    return True


def require() -> None:
    """Refuse to go on with a library that lacks a name.

    Raises:
        RuntimeError: naming everything that is missing, and the versions that have it.
    """
    lines = missing()
    if lines:
        raise RuntimeError(
            "a library changed what this package leans on: "
            + "; ".join(lines)
            + ". Versions known "
            "to work: transformers 5.17 to 5.24, torch 2.11 to 2.13, accelerate 1.15, peft 0.21"
        )


@contextmanager
def quiet_bitsandbytes() -> Iterator[None]:
    """Import what brings bitsandbytes without its advice to download a CPU kernel.

    4-bit layers are kept off that kernel here (`loading.protect_4bit_on_cpu`), so nobody has to
    read of it. The filter goes when the block ends.
    """
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.addFilter(_is_no_advice)
    try:
        yield
    finally:
        logger.removeFilter(_is_no_advice)


def _is_no_advice(record: logging.LogRecord) -> bool:
    return "gemm_4bit_forward" not in record.getMessage()
