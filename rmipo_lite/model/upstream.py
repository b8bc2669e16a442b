"""What the package leans on of other packages without their promise, so that a change is a name.

Private names move between versions, and what breaks then is a stack somewhere inside a run. Here
each stands once with its user; `missing` is asked before a trainer is made and by
`rmipo_lite.info()`, which spares itself the imports where the versions are known to hold.
"""

import importlib
import importlib.metadata
import re
from functools import reduce
from typing import NamedTuple

# First and last minor version that every name was found in.
KNOWN = {
    "torch": ((2, 11), (2, 13)), "transformers": ((5, 17), (5, 24)),
    "accelerate": ((1, 15), (1, 15)), "peft": ((0, 21), (0, 21)),
}  # fmt: skip


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


def is_known() -> bool:
    """Whether every package is installed in a version that has all names."""
    return all(first <= _installed(name) <= last for name, (first, last) in KNOWN.items())


def _installed(package: str) -> tuple[int, ...]:
    """(major, minor) of what is installed; () where there is none, or no number is in it."""
    try:
        found = re.match(r"(\d+)\.(\d+)", importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return ()
    return tuple(map(int, found.groups())) if found else ()


def _known_versions() -> str:
    named = {
        name: [".".join(map(str, version)) for version in versions]
        for name, versions in KNOWN.items()
    }
    return ", ".join(f"{name} {' to '.join(dict.fromkeys(v))}" for name, v in named.items())


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
            + f". Versions known to work: {_known_versions()}"
        )
