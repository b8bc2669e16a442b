"""The progress of a run: a panel in a notebook, a bar in a terminal, plain lines anywhere else.

`ProgressDisplay` gathers what the trainer reports in a `RunProgress` and hands it to one view.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from rmipo_lite.output import held_out
from rmipo_lite.output.console import in_notebook, in_terminal
from rmipo_lite.planning.device import memory_in_use
from rmipo_lite.watch.panel import NotebookPanel
from rmipo_lite.watch.run_progress import Phase, RunProgress, metric_line
from rmipo_lite.watch.text_progress import PlainLines, TerminalBar

if TYPE_CHECKING:
    from transformers import Trainer

PLAIN_LINE_SECONDS = 5.0


class Advance(Protocol):
    """Takes how much of a phase is done, and what it is called and of how much, by now."""

    def __call__(self, done: int, words: str = "", total: int = 0) -> None: ...


class ProgressDisplay(TrainerCallback):
    """Progress of a run in whatever the output is.

    Args:
        seconds: the shortest time between two plain lines.
        live: force the terminal's bar on or off; None looks what the output is.
    """

    def __init__(self, seconds: float = PLAIN_LINE_SECONDS, live: bool | None = None) -> None:
        self.seconds = seconds
        self.live = live
        self.run = RunProgress()
        self._chosen: PlainLines | NotebookPanel | None = None

    @property
    def _view(self) -> PlainLines | NotebookPanel:
        # Chosen at the first event: a notebook's panel begins with the evaluation before training.
        if self._chosen is None:
            if self.live is None and in_notebook():
                self._chosen = NotebookPanel()
            elif in_terminal() if self.live is None else self.live:
                self._chosen = TerminalBar(self.seconds)
            else:
                self._chosen = PlainLines(self.seconds)
        return self._chosen

    def __enter__(self) -> ProgressDisplay:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None:
            self.run.fail("interrupted" if kind is KeyboardInterrupt else "ended with an error")
        self.close()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.run.begin(state.global_step, state.max_steps)
        self._view.start(self.run)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.run.step = state.global_step
        self._view.update(self.run)

    def begin_phase(self, words: str, total: int = 0, unit: str = "") -> None:
        """Something else than steps begins: it is shown at once, since it can take as long."""
        self.run.phase = Phase(words, total, unit)
        self._view.begin_phase(self.run)

    def advance(self, done: int, words: str = "", total: int = 0) -> None:
        """So much of the phase is done; it may have other words, or know its total, by now."""
        phase = self.run.phase
        if phase is not None:
            phase.done = done
            phase.words, phase.total = words or phase.words, total or phase.total
        self._view.update(self.run)

    def end_phase(self) -> None:
        """It is over."""
        self.run.phase = None
        self._view.update(self.run)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.end_phase()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Keep the newest training numbers, and show every evaluation at once."""
        logs = logs or {}
        if "loss" in logs:
            self.run.step = state.global_step
            self.run.memory = memory_in_use(args.device)
            self.run.add(logs)
            self._view.update(self.run)
        for name, of_set in held_out.names_of("loss", logs):
            self.run.add_held_out(logs)
            numbers = metric_line(logs, prefix=name.removesuffix("loss"))
            words = held_out.label("held out", of_set)
            self._view.tell(self.run, f"step {state.global_step}: {words}  {numbers}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the view and say how long the run took."""
        self.run.end()
        self.close()
        self._view.end(self.run)

    def close(self) -> None:
        """Give the screen back; safe to call twice, and after an exception."""
        self._view.close(self.run)


def display_of(trainer: Trainer) -> ProgressDisplay | None:
    """The display that shows a trainer's run; None where nothing is shown."""
    callbacks = trainer.callback_handler.callbacks
    return next((c for c in callbacks if isinstance(c, ProgressDisplay)), None)


@contextmanager
def phase(trainer: Trainer, words: str, total: int = 0, unit: str = "") -> Iterator[Advance]:
    """Show what goes on inside the block; what it gives takes how much is done, and other words."""
    display = display_of(trainer)
    if display is None:
        yield lambda done, words="", total=0: None
        return
    display.begin_phase(words, total, unit)
    try:
        yield display.advance
    finally:
        display.end_phase()


def show_progress(trainer: Trainer, display: ProgressDisplay | None = None) -> ProgressDisplay:
    """Replace transformers' progress callbacks by ours and return it.

    A run that raises never reaches `on_train_end`; `SafeCheckpointing.train` enters the display as
    a context manager, which closes the view then too.
    """
    # In a notebook transformers' default is a third class, a table of steps and losses.
    for kind in (ProgressCallback, PrinterCallback, DEFAULT_PROGRESS_CALLBACK, ProgressDisplay):
        trainer.remove_callback(kind)
    display = display or ProgressDisplay()
    report = getattr(trainer, "data_report", None)
    if report is not None:
        display.run.data_dropped = report.dropped_count + report.refused_count
    trainer.add_callback(display)
    return display
