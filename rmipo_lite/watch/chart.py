"""What is known of a run so far, and how sure it is: the numbers that symptoms are read from."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rmipo_lite.config import RMiPOConfig
from rmipo_lite.data.report import DataReport

Logs = Sequence[dict[str, Any]]

LEAST_ANSWERS = 6  # of the model: fewer don't tell a habit
SURE = 2.0  # standard errors that a change is away from none, before it is spoken of


@dataclass(frozen=True)
class Chart:
    """What is known of a run so far.

    Attributes:
        args: the options.
        logs: log lines of training, each with its `step`.
        held_out: evaluations with their `step`, the one before training first (step 0).
        pairs: how many pairs an evaluation is a mean over.
        errors: standard errors of the held-out numbers' changes, by name with their prefix.
        answers: how many answers of the model an evaluation is a mean over.
        max_steps: of the run; 0 before it begins.
        report: the data's, None where rows came tokenised.
        ends: the token that ends an answer in training, and those that the model itself stops at,
            where they differ.
        learning_rate: the schedule's peak; 0 before there is one.
        is_anchored: whether the pairs show an end that `end_anchor` can hold.
    """

    args: RMiPOConfig
    logs: Logs = ()
    held_out: Logs = ()
    pairs: int = 0
    errors: Mapping[str, float] = field(default_factory=dict)
    answers: int = 0
    max_steps: int = 0
    report: DataReport | None = None
    ends: tuple[str, str] | None = None
    learning_rate: float = 0.0
    is_anchored: bool = True

    @property
    def step(self) -> int:
        """The last step that anything is known of."""
        return int(max((e.get("step", 0) for e in (*self.logs, *self.held_out)), default=0))

    @property
    def before(self) -> dict[str, Any] | None:
        """The evaluation before training."""
        first = next(iter(self.held_out), None)
        return first if first is not None and first["step"] == 0 else None

    def change(self, metric: str) -> tuple[float, float] | None:
        """A held-out metric before training and in the newest evaluation; None without both."""
        name = f"eval_{metric}"
        values = [entry[name] for entry in self.held_out if name in entry]
        if self.before is None or name not in self.before or len(values) < 2:
            return None
        return float(values[0]), float(values[-1])

    def error(self, metric: str) -> float:
        """Standard error of the change; NaN where nobody knows it."""
        return self.errors.get(f"eval_{metric}", math.nan)

    def sure_change(self, metric: str) -> tuple[float, float] | None:
        """As `change`, where it is more than chance: two standard errors of the paired change."""
        found = self.change(metric)
        if found is None or not abs(found[1] - found[0]) > SURE * self.error(metric):
            return None
        return found

    def change_of_answers(self, metric: str) -> tuple[float, float] | None:
        """As `sure_change`, of the model's answers, where there are enough of them."""
        return self.sure_change(metric) if self.answers >= LEAST_ANSWERS else None

    def newest(self, metric: str) -> float | None:
        """A training metric of the last line that has it."""
        return next((float(e[metric]) for e in reversed(self.logs) if metric in e), None)

    def series(self, metric: str) -> list[float]:
        """A training metric over the lines that have it."""
        return [float(entry[metric]) for entry in self.logs if metric in entry]
