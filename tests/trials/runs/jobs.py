"""What the children of the survival checks run; every line begins with a word to wait for."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any
from unittest import mock

from transformers import TrainerCallback

from rmipo_lite import run
from rmipo_lite.output.console import say
from rmipo_lite.selftest.survival import saving_trainer
from rmipo_lite.watch.progress import show_progress
from tests.kit import tiny_model, train_words, word_rows

ASKED_STEPS = 10


class Announce(TrainerCallback):
    """Prints what has just been done, for the parent to aim at."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step is about to run."""
        say(f"begun {state.global_step + 1}.")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The update has been made; a save may follow."""
        say(f"stepped {state.global_step}.")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The checkpoint is in its place."""
        say(f"saved {state.global_step}.")


def saving_run(folder: str) -> None:
    """A run that saves after every step, to be killed."""
    saving_trainer(Path(folder), callbacks=[Announce()]).train()
    say("ended.")


def asked_run(folder: str, resume: bool) -> None:
    """`train()` from start to end, to be interrupted; prints what it returned."""
    say("started.")
    result = asked_train(Path(folder), resume)
    say(f"returned {result.stopped_at_step}; {result!r}")
    handler = signal.getsignal(signal.SIGINT)
    say(f"handler {handler is signal.default_int_handler}.")


def asked_train(folder: Path, resume: bool) -> Any:
    """`train()` on a tiny model, evaluating and saving on the way."""

    def announcing(trainer: Any) -> None:
        show_progress(trainer)
        trainer.add_callback(Announce())

    with mock.patch.object(run, "show_progress", announcing):
        return train_words(
            tiny_model(),
            folder,
            word_rows(24),
            resume=resume,
            max_steps=ASKED_STEPS,
            save_steps=3,
            eval_strategy="steps",
            eval_steps=4,
            logging_steps=1,
        )
