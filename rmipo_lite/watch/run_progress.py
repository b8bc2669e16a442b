"""What a running training looks like in numbers; how they are shown is the views' business.

Filled by `progress.ProgressDisplay`, read by `text_progress.py` and `panel.py`.
"""

import math
import time
from dataclasses import dataclass, field
from typing import Any

from rmipo_lite.output.console import duration
from rmipo_lite.output.held_out import names_of

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


@dataclass
class Phase:
    """What goes on beside the training steps: an evaluation, a measurement, a search.

    Attributes:
        words: what it is.
        total: of what it counts; 0 where nobody knows.
        unit: what it counts.
        done: of the total.
    """

    words: str
    total: int = 0
    unit: str = ""
    done: int = 0
    started: float = field(default_factory=lambda: time.monotonic())

    @property
    def text(self) -> str:
        """Words, how much is done, and the time left at the pace so far."""
        if not self.total:
            return self.words
        if not self.done:
            return f"{self.words}, {self.total} {self.unit}".rstrip()
        parts = [self.words, f"{self.done} of {self.total} {self.unit}".rstrip()]
        if self.done < self.total:
            passed = time.monotonic() - self.started
            parts.append(f"{duration(passed / self.done * (self.total - self.done))} left")
        return ", ".join(parts)


@dataclass
class RunProgress:
    """A run between its first evaluation and its end.

    Attributes:
        step, max_steps: optimizer steps done and wanted; 0 of 0 before training starts.
        state: "starting", "training", or how it ended.
        phase: what goes on beside the steps; None where nothing does.
        logs: every log line with a training loss, and `held_out` every evaluation, with its step.
        data_dropped: rows that were dropped or refused before training.
        memory: (bytes in use, bytes there), read when a line was logged.
    """

    step: int = 0
    max_steps: int = 0
    state: str = "starting"
    phase: Phase | None = None
    logs: list[dict[str, float]] = field(default_factory=list)
    held_out: list[dict[str, float]] = field(default_factory=list)
    data_dropped: int = 0
    memory: tuple[int, int] | None = None
    tokens_per_second: float | None = None
    _first_step: int = 0
    _started: float = 0.0
    _ended: float = 0.0
    _window_start: float = 0.0
    _tokens: float = 0.0

    def begin(self, step: int, max_steps: int) -> None:
        """The first step is about to start; a resumed run has steps behind it."""
        self.step = self._first_step = step
        self.max_steps = max_steps
        self._started = self._window_start = time.monotonic()
        self.state, self._tokens, self._ended = "training", 0.0, 0.0
        self.phase = None
        self.tokens_per_second = None
        if self.logs:  # of an earlier run of the same trainer
            self.logs, self.held_out = [], []

    def end(self) -> None:
        """The last step is done, or the run has been stopped."""
        self._ended = time.monotonic()
        whole = self.step >= self.max_steps
        self.state = "done" if whole else f"stopped at step {self.step}"

    def fail(self, state: str) -> None:
        self._ended = time.monotonic()
        self.state = state

    def add(self, logs: dict[str, float]) -> None:
        """Take a log line of training."""
        now = time.monotonic()
        tokens, taken = logs.get("num_tokens"), now - self._window_start
        if tokens is not None and taken > 0:
            # of a resumed run the first window's tokens aren't known
            if self._tokens or not self._first_step:
                self.tokens_per_second = (tokens - self._tokens) / taken
            self._tokens = tokens
        self._window_start = now
        self.logs.append({**logs, "step": self.step})

    def add_held_out(self, logs: dict[str, float]) -> None:
        """Take the numbers of an evaluation; its time is no step's."""
        self.phase = None
        self._window_start += sum(logs[name] for name, _ in names_of("runtime", logs))
        self.held_out.append({**logs, "step": self.step})

    @property
    def numbers(self) -> str:
        """The newest training numbers in one line; empty before the first."""
        return metric_line(self.logs[-1]) if self.logs else ""

    @property
    def steps_done(self) -> int:
        """Steps since this call of train()."""
        return self.step - self._first_step

    @property
    def seconds(self) -> float:
        return (self._ended or time.monotonic()) - self._started

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the last step, at the pace so far; None before the first step's end."""
        if not self.steps_done:
            return None
        return self.seconds / self.steps_done * (self.max_steps - self.step)

    @property
    def is_over(self) -> bool:
        return self._ended > 0

    @property
    def activity(self) -> str:
        """What is being done, in a word or two."""
        return self.state if self.phase is None else self.phase.text

    @property
    def headline(self) -> str:
        if self.is_over:
            took = f"{self.state}: {self.steps_done} steps in {duration(self.seconds)}"
            return took if self.phase is None else f"{took}, {self.activity}"
        if not self.max_steps:
            return self.activity
        left = self.seconds_left
        parts = [
            f"step {self.step}/{self.max_steps}",
            *([] if left is None else [f"{duration(left)} left"]),
            *([] if self.phase is None else [self.activity]),
        ]
        return ", ".join(parts)

    @property
    def dropped(self) -> int:
        """Pairs that training dropped as not finite."""
        return int(self.logs[-1].get("rmipo/dropped_pairs", 0)) if self.logs else 0

    def series(self, metric: str, *, held_out: bool = False) -> list[tuple[float, float]]:
        """(step, value) of a metric, finite values only."""
        entries, name = (self.held_out, f"eval_{metric}") if held_out else (self.logs, metric)
        points = [(float(e["step"]), float(e[name])) for e in entries if name in e]
        return [(step, value) for step, value in points if math.isfinite(value)]
