"""Going on from a checkpoint: what has to be the same, and what may be another and takes effect.

A checkpoint keeps what its run was: the model, the adapter's config, the pairs and how they became
tokens. Where one of these differs, going on would give the run of neither. Everything else may
change between two calls: learning rate, schedule, steps, batch, optimizer, loss, saving, logging.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from rmipo_lite.adapters.base_model import causal_lm
from rmipo_lite.adapters.start import start_of
from rmipo_lite.checkpoints.sealed_folder import CheckpointError
from rmipo_lite.checkpoints.state import load_state
from rmipo_lite.checkpoints.trainer_mixin import TrainerBeside
from rmipo_lite.checkpoints.weights import fingerprint
from rmipo_lite.model.generation import vocabulary_size
from rmipo_lite.output.console import say
from rmipo_lite.output.redaction import redact
from rmipo_lite.parallel.sharded import full
from rmipo_lite.step.losses import pairs_digest

_TENSORS, _VALUES = 64, 4  # of the weights that aren't trained, as many are compared
_TOLERANCE = 0.02  # of a tensor's largest: the same weights may stand in 16 bits or in 32
# Of an adapter's config: where it came from, and what changes nothing of what it is.
_OF_NO_MEANING = {
    "base_model_name_or_path", "inference_mode", "revision", "auto_mapping", "peft_version",
    "runtime_config", "task_type", "lora_dropout",
}  # fmt: skip
_OF_TOKENS = (
    "tokenization", "max_length", "max_prompt_length", "truncation_mode", "chat_template", "seed",
    "data_seed", "train_sampling_strategy",
)  # fmt: skip
# Options that name places and people, or are a copy of others.
_NOT_COMPARED = {
    "output_dir", "run_name", "hub_token", "hub_model_id", "resume_from_checkpoint", "local_rank",
    "activation_checkpointing", "disable_tqdm", "logging_dir", "use_cpu", *_OF_TOKENS,
}  # fmt: skip

# What a run did before there were these options.
_BEFORE_THERE_WERE = {"length_balance": "off", "end_anchor": 0.0}


def identity(trainer: Any) -> dict[str, Any]:
    """What makes the run what it is, as JSON: name -> value, the telling ones first."""
    model, args = trainer.model, trainer.args
    base = causal_lm(model)
    pairs = trainer.train_dataset
    return {
        "model": {
            "type": type(base).__name__,
            "layers": getattr(base.config.get_text_config(), "num_hidden_layers", None),
            "vocabulary": vocabulary_size(model),
        },
        "weights": _sample(model),
        "peft_config": _adapter(model),
        "reference model": _other_reference(trainer),
        **{name: getattr(args, name) for name in _OF_TOKENS},
        **_grouping(args),
        "pairs": len(pairs),
        "pairs_digest": pairs_digest(pairs),
    }


def _other_reference(trainer: Any) -> str | None:
    """Of `ref_model`, by which a checkpoint's pairs are scored; None: the model's own start."""
    reference = trainer.pair_step.reference
    if reference is None or reference.step is trainer.pair_step:
        return None
    return fingerprint(reference.step.model.named_parameters())


def _grouping(args: Any) -> dict[str, Any]:
    """Pairs grouped by length come in an order that hangs on the batch."""
    grouped = args.train_sampling_strategy == "group_by_length"
    return {"pairs_per_step": args.pairs_per_step} if grouped else {}


def _sample(model: Any) -> dict[str, list[float]]:
    """A few values of weights that no step changes, spread over the model; by name.

    What is trained comes from the checkpoint. An adapter that took a part out of its layers' base
    may have begun elsewhere (its start is drawn anew): these aren't asked.
    """
    moved = ".base_layer." if start_of(model) is not None else None
    frozen = [
        (name, weight)
        for name, weight in model.named_parameters()
        if not weight.requires_grad and weight.numel() and not (moved and moved in name)
    ]
    step = max(1, len(frozen) // _TENSORS)
    return {name: _some(weight) for name, weight in frozen[::step]}


def _some(weight: torch.Tensor) -> list[float]:
    flat = full(weight.detach()).flatten()
    places = torch.linspace(0, len(flat) - 1, _VALUES, dtype=torch.float64).long()
    values: list[float] = flat[places.to(flat.device)].float().tolist()
    return values


def _adapter(model: Any) -> dict[str, Any] | None:
    if not isinstance(model, PeftModel):
        return None
    config = model.active_peft_config.to_dict()
    return {name: _plain(config[name]) for name in sorted(config.keys() - _OF_NO_MEANING)}


def _plain(value: Any) -> Any:
    """A value as JSON gives it back."""
    if isinstance(value, set | frozenset | list | tuple):
        return sorted(map(str, value)) if isinstance(value, set | frozenset) else list(value)
    return value if isinstance(value, int | float | str | dict | None) else str(value)


def refuse_other_run(stored: dict[str, Any], own: dict[str, Any], name: str) -> None:
    """Raise CheckpointError for the first thing in which the checkpoint is of another run."""
    for key, value in own.items():
        if key not in stored or key == "weights":
            continue
        there = stored[key]
        if isinstance(value, dict) and isinstance(there, dict):
            differing = [k for k in value if k in there and there[k] != value[k]]
            if differing:
                inner = differing[0]
                raise _other(name, f"{key} {inner}", there[inner], value[inner])
        elif there != value:
            raise _other(name, key, _short(there), _short(value))
    for weight, values in own["weights"].items():
        there = stored["weights"].get(weight, values)
        scale = max(map(abs, values))
        if any(abs(a - b) > _TOLERANCE * scale for a, b in zip(there, values, strict=True)):
            raise _other(name, f"the base model's {weight}", *map(_rounded, (there, values)))


def _other(name: str, what: str, there: Any, here: Any) -> CheckpointError:
    return CheckpointError(
        f"{name} is of another run: {what} is {there!r} there and {here!r} here. Go on with what "
        "the run began with, or start anew in another output_dir"
    )


def _short(value: Any) -> Any:
    """A whole adapter's config is one word, and of a digest the first digits tell."""
    if isinstance(value, dict):
        return value.get("peft_type", "an adapter")
    if value is None:
        return "none"
    return f"{value[:12]}..." if isinstance(value, str) and len(value) > 60 else value


def _rounded(values: list[float]) -> list[float]:
    return [float(f"{value:.4g}") for value in values]


def options_of(args: Any) -> dict[str, Any]:
    """The options that may change between two calls, as JSON."""
    values = redact(args.to_dict())
    return {name: _plain(values[name]) for name in sorted(values.keys() - _NOT_COMPARED)}


def changed_options(stored: dict[str, Any], own: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Options with another value here: name -> (there, here)."""
    both = sorted(stored.keys() & own.keys())
    return {name: (stored[name], own[name]) for name in both if stored[name] != own[name]}


class GoingOn(TrainerBeside):
    """Mixin for `transformers.Trainer`: a resumed run, with other options where these changed."""

    refuse_later_prior: Callable[[str, dict[str, Any]], None]  # of `KnowsBefore`
    changed: Mapping[str, Any]
    _place: tuple[int, int] | None = None  # where a checkpoint stands: epochs, pairs of the next
    _step_before: int = 0

    def run_state(self) -> dict[str, Any]:
        """What a checkpoint keeps of all this."""
        return {
            "identity": identity(self),
            "options": options_of(self.args),
            "place": self._place_now(),
        }

    def _place_now(self) -> tuple[int, int]:
        """(whole epochs, pairs of the next one) that are behind the run."""
        steps = self.args.steps_of_an_epoch(len(self.train_dataset))
        epochs, rest = divmod(round((self.state.epoch or 0.0) * steps), steps)
        return epochs, rest * self.args.pairs_per_step

    def check_resume(self, folder: Path) -> dict[str, Any]:
        """The checkpoint's extra state, if it is of this run.

        Raises CheckpointError, with both values, where it isn't.
        """
        state: dict[str, Any] = load_state(folder, "extra_state")
        if "identity" in state:  # absent in checkpoints of version 0.1.0
            refuse_other_run(state["identity"], identity(self), folder.name)
        rate = state.get("options", {}).get("learning_rate", self.args.learning_rate)
        if self.args.learning_rate == "auto" and rate != "auto":
            raise CheckpointError(
                f"{folder.name}: learning_rate was {rate} there, and 'auto' looks for one before a "
                "run, not in its middle; pass a number"
            )
        if self.args.uses_prior and self.args.prior == "cached":
            self.refuse_later_prior(folder.name, state)
        return state

    def take_changes(self, state: dict[str, Any]) -> None:
        """Find out what has changed since the checkpoint, and say it."""
        before = state.get("options", {})
        self.changed = changed_options({**_BEFORE_THERE_WERE, **before}, options_of(self.args))
        if self.changed:
            lines = (f"{name} {was!r} -> {now!r}" for name, (was, now) in self.changed.items())
            say(f"Going on with other options than before: {', '.join(lines)}")
        self._step_before = int(state["step"])
        self._place = state.get("place")  # absent in checkpoints of version 0.1.0

    def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
        """The steps that are left are counted from the checkpoint's place, of today's batch."""
        epochs, *values, max_steps = super().set_initial_training_values(  # type: ignore[misc]
            args, dataloader
        )
        if self._place is not None:
            steps = len(dataloader)
            done = self._place[0] * steps + self._place[1] // args.pairs_per_step
            if args.max_steps > 0:  # these end the run, in whichever epoch
                epochs = max(epochs, math.ceil((done + max_steps - self._step_before) / steps))
            else:
                left = math.ceil(args.num_train_epochs * steps) - done
                max_steps = self._step_before + max(0, left)
        return epochs, *values, max_steps

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, epochs: int, checkpoint: Any, trial: Any
    ) -> tuple[int, int]:
        """A resumed run goes on at the checkpoint's place among the pairs, with today's options."""
        done, in_epoch = super()._init_training_state(  # type: ignore[misc]
            max_steps, steps_per_epoch, epochs, checkpoint, trial
        )
        if checkpoint is None:
            return done, in_epoch
        self.state.compute_steps(self.args, max_steps)  # the checkpoint's would win
        if self.state.global_step >= max_steps:
            say(f"Nothing to do: step {self.state.global_step} of {max_steps} is reached already")
            return epochs, 0
        if self._place is not None and not self.args.ignore_data_skip:
            done = self._place[0]
            in_epoch, again = divmod(self._place[1], self.args.pairs_per_step)
            if again:
                say(f"{again} pairs are trained once more in this epoch: batches begin elsewhere")
        return done, in_epoch
