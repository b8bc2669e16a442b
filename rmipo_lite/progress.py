"""The progress of a run: a rich bar in a terminal, plain lines anywhere else.

A bar that rewrites its line turns a log file, a pipe or a notebook into noise, so there (and under
`TERM=dumb`) a plain line is printed every few seconds. Nothing here raises for want of a terminal.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from rmipo_lite.display import duration, in_terminal, printable, say

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

PLAIN_LINE_SECONDS = 5.0

# metric in the log, label in the line, format
_SHOWN = (
    ("loss", "loss", "{:.4f}"),
    ("rewards/accuracies", "accuracy", "{:.2f}"),
    ("rewards/margins", "margin", "{:+.3f}"),
    ("rmipo/gamma", "gamma", "{:.2f}"),
)


def metric_line(logs: dict[str, Any], prefix: str = "") -> str:
    """The few numbers of a log entry that fit one line, in a fixed order."""
    parts = []
    for key, label, fmt in _SHOWN:
        value = logs.get(prefix + key)
        if isinstance(value, (int, float)):
            parts.append(f"{label} {fmt.format(value)}")
    return "  ".join(parts)


class ProgressDisplay(TrainerCallback):
    """Progress of a run: a rich bar in a terminal, plain lines elsewhere.

    Args:
        seconds: the shortest time between two plain lines.
        live: force the bar on or off; None asks the terminal.
    """

    def __init__(self, seconds: float = PLAIN_LINE_SECONDS, live: bool | None = None) -> None:
        self.seconds = seconds
        self.live = live
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._numbers = ""
        self._started = self._last_line = 0.0
        self._first_step = 0

    def __enter__(self) -> ProgressDisplay:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the bar, or note the time for the plain lines."""
        self._started = time.monotonic()
        self._last_line = self._started
        self._first_step = state.global_step
        self._numbers = ""
        if in_terminal() if self.live is None else self.live:
            self._start_bar(state)

    def _start_bar(self, state: TrainerState) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self._progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=Console(file=sys.stdout, force_jupyter=False),
        )
        self._task = self._progress.add_task(
            "training", total=state.max_steps, completed=state.global_step, numbers=""
        )
        self._progress.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the bar, or print a line when enough time has passed."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=state.global_step, numbers=self._numbers)
            return
        now = time.monotonic()
        if now - self._last_line >= self.seconds:
            self._last_line = now
            say(self._line(state, now))

    def _line(self, state: TrainerState, now: float) -> str:
        done = state.global_step - self._first_step
        left = (now - self._started) / max(done, 1) * (state.max_steps - state.global_step)
        text = f"step {state.global_step}/{state.max_steps}  {duration(left)} left"
        return f"{text}  {self._numbers}".rstrip()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep the newest training numbers, and show every evaluation at once."""
        logs = logs or {}
        if "loss" in logs:
            self._numbers = metric_line(logs)
        if any(key.startswith("eval_") for key in logs):
            numbers = metric_line(logs, prefix="eval_")
            if numbers:
                self._tell(f"step {state.global_step}: held out  {numbers}")

    def _tell(self, text: str) -> None:
        if self._progress is not None:
            # markup off: a file name with [brackets] is text, not a style
            self._progress.console.print(printable(text), markup=False, highlight=False)
        else:
            say(text)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar and say how long the run took."""
        took = time.monotonic() - self._started
        done = state.global_step - self._first_step
        self.close()
        say(f"{done} steps in {duration(took)}" + (f"  {self._numbers}" if self._numbers else ""))

    def close(self) -> None:
        """Stop the bar and give the cursor back; safe to call twice, and after an exception."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = self._task = None


def attach_progress(trainer: Trainer, display: ProgressDisplay | None = None) -> ProgressDisplay:
    """Replace transformers' progress callbacks by ours and return it.

    A run that raises never reaches `on_train_end`; `SafeCheckpointing.train` enters the display as
    a context manager, which closes the bar then too.
    """
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    display = display or ProgressDisplay()
    trainer.add_callback(display)
    return display
