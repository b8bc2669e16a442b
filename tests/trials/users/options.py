"""Check 46: every option of a run, set to None, to something of a wrong type, to 0 and to -1.

Either an error names the option, before anything was trained, or the run is right: it makes the
steps that its options ask for, its numbers are finite, and where the value is the default it is the
default's run to the last digit.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import tempfile
from pathlib import Path
from typing import Any

from rmipo_lite import RMiPOConfig, RMiPOTrainer
from tests.kit import tiny_model, word_rows, word_tokenizer
from tests.trials.scorecard import Check, Trials, expect

_STEPS = 2
_USUAL = {
    "max_steps": _STEPS, "per_device_train_batch_size": 4, "eval_completions": 0,
    "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "logging_steps": 1,
    "learning_rate": 1e-3,  # no search in each of them
}  # fmt: skip


class Stranger:
    """A value of no type that any option has."""

    def __repr__(self) -> str:
        return "Stranger()"


_VALUES: tuple[Any, ...] = (None, Stranger(), 0, -1)
_CASES = [
    (option, value)
    for option, value in itertools.product(dataclasses.fields(RMiPOConfig), _VALUES)
    if option.init
]


def options(trials: Trials) -> None:
    """The option and the value of each index."""
    for trial in trials:
        with trial:
            option, value = _CASES[trial.index]
            trial.tried = f"{option.name}={value!r}"
            _try(option, value, trial.folder)


def _try(option: Any, value: Any, folder: Path) -> None:
    try:
        numbers = _run(folder, {option.name: value})
    except (ValueError, TypeError) as error:
        expect(option.name in str(error), f"an error that doesn't name it: {error}")
        return
    expect(all(map(math.isfinite, numbers)), f"not finite: {numbers}")
    # Without a number of steps it is an epoch: 12 pairs in fours.
    wanted = 3 if option.name == "max_steps" else _STEPS
    if option.name == "per_device_train_batch_size":
        wanted = _STEPS
    expect(len(numbers) == wanted, f"{len(numbers)} steps for {wanted}")
    if option.name not in _USUAL and option.default == value:
        expect(numbers == _usual_numbers(), "the default, named, is another run")


def _run(folder: Path, changed: dict[str, Any]) -> list[float]:
    """The loss of every step."""
    trainer = RMiPOTrainer(
        tiny_model("llama"),
        RMiPOConfig(**{"output_dir": str(folder / "run"), **_USUAL, **changed}),
        train_dataset=word_rows(12),
        processing_class=word_tokenizer(),
        peft_config="auto",
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@functools.cache
def _usual_numbers() -> list[float]:

    with tempfile.TemporaryDirectory() as folder:
        return _run(Path(folder), {})


CHECKS = [Check(46, "every option: None, a wrong type, 0, -1", len(_CASES), options)]
