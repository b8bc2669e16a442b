"""The progress of a run: a panel in a notebook, a bar in a terminal, plain lines anywhere else.

`ProgressDisplay` gathers what the trainer reports in a `RunProgress` and hands it to one view.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from rmipo_lite.output import held_out
from rmipo_lite.output.console import in_notebook, in_terminal
from rmipo_lite.planning.device import memory_in_use
from rmipo_lite.watch.panel import NotebookPanel
from rmipo_lite.watch.run_progress import RunProgress, metric_line
from rmipo_lite.watch.text_progress import PlainLines, TerminalBar

if TYPE_CHECKING:
    from transformers import Trainer

PLAIN_LINE_SECONDS = 5.0


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

    def search(self, words: str) -> None:
        """How far the search for a learning rate is, before training; empty at its end."""
        self.run.search = words
        self._view.update(self.run)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An evaluation goes on: say so, since it can take as long as many steps."""
        self.run.batches += 1
        self._view.update(self.run)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.run.batches = 0
        self._view.update(self.run)

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
