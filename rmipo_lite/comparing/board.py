"""What is shown while a comparison runs: one board in a notebook, a line a run anywhere else."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Any

from transformers import TrainerCallback

from rmipo_lite.comparing.outcome import RunOutcome
from rmipo_lite.output.console import duration, in_notebook, say
from rmipo_lite.output.table import escaped, html_table

_REDRAW_SECONDS = 1.0
_LINE_SECONDS = 30.0  # between two lines of a run


class Board(TrainerCallback):
    """Shows runs as they come, whatever becomes of the output meanwhile.

    Each run's own lines go into a file: this writes where the comparison was called.
    """

    def __init__(self, runs: int) -> None:
        self._out, self._is_live = sys.stdout, in_notebook()
        self._runs, self._began, self._last = runs, time.monotonic(), 0.0
        self._rows: list[tuple[str, str, str]] = []
        self._made, self._now, self._run_began = 0, "", time.monotonic()
        self._handle: Any = None

    def tell(self, text: str) -> None:
        """A line for people."""
        with contextlib.redirect_stdout(self._out):
            say(text)

    def begin(self, method: str, seed: int) -> None:
        """A run begins."""
        self._now, self._run_began = f"{method}, seed {seed}", time.monotonic()
        self._rows.append((method, str(seed), "beginning"))
        self._last = 0.0
        self._draw()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Of the run in progress."""
        self.doing(f"step {state.global_step} of {state.max_steps}")

    def doing(self, words: str) -> None:
        """What the run in progress does now."""
        self._rows[-1] = (*self._rows[-1][:2], words)
        wait = _REDRAW_SECONDS if self._is_live else _LINE_SECONDS
        now = time.monotonic()
        if now - max(self._last, self._run_began) < wait:
            return
        self._last = now
        if self._is_live:
            self._draw()
        else:
            self.tell(f"  {self._now}: {words}")

    def end(self, outcome: RunOutcome, *, was_there: bool = False) -> None:
        """A run is over: made, failed, or found in its folder."""
        self._made += 1
        state = f"FAILED: {outcome.error}" if outcome.error else _numbers(outcome)
        if was_there:
            self._rows.append((outcome.method, str(outcome.seed), f"{state} (was there)"))
        else:
            self._rows[-1] = (outcome.method, str(outcome.seed), state)
        if self._is_live:
            self._draw()
        else:
            method, seed, state = self._rows[-1]
            self.tell(f"{self._made} of {self._runs}: {method}, seed {seed}: {state}")

    def _draw(self) -> None:
        if not self._is_live:
            return
        taken = time.monotonic() - self._began
        left = taken / self._made * (self._runs - self._made) if self._made else 0.0
        about = f", about {duration(left)} left" if left else ""
        head = f"{self._made} of {self._runs} runs, {duration(taken)}{about}"
        table = html_table(("method", "seed", "state"), self._rows)
        bundle = {"text/html": f"<p><b>{escaped(head)}</b></p>{table}", "text/plain": head}
        try:
            if self._handle is None:
                from IPython.display import display

                self._handle = display(bundle, raw=True, display_id=True)
            else:
                self._handle.update(bundle, raw=True)
        except Exception as error:  # whatever became of the page, the runs go on
            self._is_live = False
            self.tell(f"The board is no longer drawn ({type(error).__name__}: {error})")


def _numbers(outcome: RunOutcome) -> str:
    parts = [f"accuracy {outcome.mean('accuracy'):.3f}"] if "accuracy" in outcome.cases else []
    if "win_rate" in outcome.cases:
        parts.append(f"win rate {outcome.mean('win_rate'):.3f}")
    rate = outcome.learning_rate
    parts += [] if rate is None else [f"learning rate {rate:.2g}"]
    return ", ".join([*parts, duration(outcome.seconds)])
