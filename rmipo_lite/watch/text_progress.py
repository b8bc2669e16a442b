"""A run's progress as text: a rich bar in a terminal, plain lines anywhere else.

A bar that rewrites its line turns a log file or a pipe into noise, so there (and under `TERM=dumb`)
a plain line is printed every few seconds. Nothing here raises for want of a terminal.
"""

from __future__ import annotations

import sys
import time
from typing import IO, TYPE_CHECKING, cast

from rmipo_lite.output.console import Lenient, duration, printable, say

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from rmipo_lite.watch.run_progress import RunProgress


class PlainLines:
    """One line every `seconds` at most, one for each evaluation, and one at the end."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._last_line = time.monotonic()

    def start(self, run: RunProgress) -> None:
        self._last_line = time.monotonic()

    def update(self, run: RunProgress) -> None:
        if not run.max_steps and run.phase is None:  # between two phases before the first step
            return
        now = time.monotonic()
        if now - self._last_line >= self.seconds:
            self._last_line = now
            say(f"{run.headline}  {run.numbers}".rstrip())

    def begin_phase(self, run: RunProgress) -> None:
        """Before the first step there is nothing else to see; between steps it has to last."""
        if not run.max_steps or run.is_over:
            say(run.activity)
            self._last_line = time.monotonic()

    def tell(self, run: RunProgress, text: str) -> None:
        say(text)

    def close(self, run: RunProgress) -> None:
        """Nothing is held."""

    def end(self, run: RunProgress) -> None:
        say(f"{run.steps_done} steps in {duration(run.seconds)}  {run.numbers}".rstrip())


class TerminalBar(PlainLines):
    """rich's bar; outside of the training loop the plain lines of the base class."""

    _progress: Progress | None = None
    _task: TaskID | None = None

    def start(self, run: RunProgress) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=Console(file=cast(IO[str], Lenient(sys.stdout)), force_jupyter=False),
        )
        self._task = self._progress.add_task(
            run.activity, total=run.max_steps, completed=run.step, numbers=""
        )
        self._progress.start()

    def update(self, run: RunProgress) -> None:
        if self._progress is None or self._task is None:
            super().update(run)
            return
        self._progress.update(
            self._task, completed=run.step, numbers=run.numbers, description=run.activity
        )

    def begin_phase(self, run: RunProgress) -> None:
        if self._progress is None:
            super().begin_phase(run)
        else:
            self.update(run)

    def tell(self, run: RunProgress, text: str) -> None:
        if self._progress is None:
            super().tell(run, text)
        else:
            # markup off: a file name with [brackets] is text, not a style
            self._progress.console.print(printable(text), markup=False, highlight=False)

    def close(self, run: RunProgress) -> None:
        """Stop the bar and give the cursor back; safe to call twice, and after an exception."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = self._task = None
