"""Ctrl-C that stops a run at the next step boundary instead of in the middle of an update.

An interrupt inside `optimizer.step` leaves part of the parameters updated (measured: 96 of 400),
and such a state is neither the old one nor the new one. So the first SIGINT only sets a flag, and
the run saves and stops when the step it is in has ended (an evaluation is cut short, a save goes to
its end). A second SIGINT raises KeyboardInterrupt at once: the run ends there, and the last
checkpoint is what is left. SIGTERM, by which clusters end a job, is heard in the same way.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from transformers import TrainerCallback

from rmipo_lite.output.console import say
from rmipo_lite.parallel.group import Group


class GracefulInterrupt(TrainerCallback):
    """A callback and a context manager: the handler is installed only inside the `with` block.

    `SafeCheckpointing.train` enters it, so passing it in `callbacks` is enough there. With a stock
    Trainer write `with interrupt: trainer.train()`. Outside the main thread Python allows no
    signal handlers; there it does nothing, and `request()` still works.

    Attributes:
        stopped_at_step: the step after which the run stopped on request, or None.
    """

    def __init__(self) -> None:
        self.requested = False
        self.stopped_at_step: int | None = None
        self._previous: dict[int, Any] = {}
        self._depth = 0

    def __enter__(self) -> GracefulInterrupt:
        self._depth += 1
        if self._depth == 1:
            self.requested = False
            self.stopped_at_step = None
            if threading.current_thread() is threading.main_thread():
                for number in (signal.SIGINT, signal.SIGTERM):
                    self._previous[number] = signal.getsignal(number)
                    signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._depth -= 1
        if self._depth == 0:
            for number, handler in self._previous.items():
                # None: something that isn't Python's installed it
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
            self._previous = {}

    def request(self) -> None:
        """Ask the run to save and stop when the current step has ended."""
        self.requested = True

    def answered(self) -> None:
        """The run has stopped as asked: the next Ctrl-C asks anew."""
        self.requested = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.request()
        say("Stopping when this step, or this save, is whole. Ctrl-C again stops at once.")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Turn the flag into a save and a stop; the step is whole here, and everybody's."""
        self.requested = Group.current().any(self.requested)
        if self.requested and self.stopped_at_step is None:
            self.stopped_at_step = state.global_step
            control.should_log = True
            control.should_save = True
            control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the loop from evaluating and saving once more as if the epoch had ended.

        An evaluation that the uninterrupted run doesn't do there would move the random state,
        and the resumed run would differ.
        """
        if self.stopped_at_step is not None and float(state.epoch or 0.0) % 1.0 != 0.0:
            control.should_evaluate = False
            control.should_save = False
