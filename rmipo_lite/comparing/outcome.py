"""What a run of a comparison left: its numbers, case by case, and its answers, in one file."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rmipo_lite.checkpoints.sealed_folder import files_put_in_place
from rmipo_lite.model.generation import Generated
from rmipo_lite.results.loaded import LoadedRun, load_run
from rmipo_lite.watch.completions import repeated_share

FILE = "outcome.json"

# Measure -> (words, unit or empty, whether more is better; None: neither).
MEASURES: dict[str, tuple[str, str, bool | None]] = {
    "win_rate": ("win rate", "", True),
    "accuracy": ("held-out accuracy", "", True),
    "margin": ("margin", "reward", None),
    "chosen_moved": ("chosen log-prob moved", "nats/token", None),
    "length": ("answer length", "tokens", None),
    "unended": ("unended", "", False),
    "repetition": ("repetition", "", False),
}
# Of which a difference between two methods means something: not a margin, which is in each
# method's own unit.
COMPARABLE = tuple(name for name in MEASURES if name != "margin")
_OF_PAIRS = {
    "accuracy": "eval_rewards/accuracies",
    "margin": "eval_rewards/margins",
    "chosen_moved": "eval_logps/chosen",
}
Cases = dict[str, float]  # a held-out pair or a prompt -> its value


@dataclass
class RunOutcome:
    """A run of a comparison.

    Attributes:
        method: the contender's name.
        seed: of order, adapter and sampled answers.
        folder: of the run, with its adapter; its lines are in `<folder>.log` beside it.
        options: in which the contender differs.
        learning_rate: the peak rate, found where the options say auto.
        steps, seconds: taken by training, searches and evaluations of the run.
        cases: measure -> case -> value, of held-out pairs or of prompts.
        answers: one sampled answer to each prompt.
        error: why there is nothing, where a run failed.
    """

    method: str
    seed: int
    folder: Path
    options: dict[str, Any] = field(default_factory=dict)
    learning_rate: float | None = None
    steps: int = 0
    seconds: float = 0.0
    cases: dict[str, Cases] = field(default_factory=dict)
    answers: list[str] = field(default_factory=list)
    error: str | None = None

    def mean(self, measure: str) -> float:
        """Over the cases; NaN where there is none."""
        values = list(self.cases.get(measure, {}).values())
        return statistics.fmean(values) if values else math.nan

    def load(self, **options: Any) -> LoadedRun:
        """The run's model, with what `load_run` takes."""
        return load_run(self.folder, **options)

    def write(self) -> None:
        """Into its folder; from here on the run counts as made."""
        write_json(self.folder / FILE, {**asdict(self), "folder": self.folder.name})


def write_json(file: Path, kept: Any) -> None:
    """Whole or not at all: killed while it writes, what was there before is there."""
    text = json.dumps(kept, ensure_ascii=False, indent=1, default=str)
    with files_put_in_place(file.parent) as staged:
        (staged / file.name).write_text(text + "\n", encoding="utf-8")


def read_outcome(folder: Path) -> RunOutcome | None:
    """What `write` wrote; None where the run isn't made yet."""
    file = folder / FILE
    if not file.is_file():
        return None
    kept = json.loads(file.read_text(encoding="utf-8"))
    return RunOutcome(**{**kept, "folder": folder})


def cases_of_pairs(
    before: Mapping[str, Mapping[Any, float]], after: Mapping[str, Mapping[Any, float]]
) -> dict[str, Cases]:
    """The measures of the held-out pairs, from an evaluation's values before and after."""
    found: dict[str, Cases] = {}
    for measure, name in _OF_PAIRS.items():
        values = dict(after.get(name, {}))
        if measure == "chosen_moved":
            first = before.get(name, {})
            values = {case: value - first[case] for case, value in values.items() if case in first}
        if values:
            found[measure] = {str(case): value for case, value in values.items()}
    return found


def of_whole_pairs(
    values: Mapping[str, Mapping[Any, float]],
) -> dict[str, dict[Any, float]]:
    """The values of pairs from those of their halves, rows 2i and 2i + 1 of pair i."""
    sides = [
        {row // 2: value for row, value in values.get(f"eval_rewards/{side}", {}).items()}
        for side in ("chosen", "rejected")
    ]
    margins = {pair: sides[0][pair] - sides[1][pair] for pair in sides[0] if pair in sides[1]}
    chosen = values.get("eval_logps/chosen", {})
    return {
        "eval_rewards/margins": margins,
        "eval_rewards/accuracies": {pair: float(gap > 0) for pair, gap in margins.items()},
        "eval_logps/chosen": {row // 2: value for row, value in chosen.items()},
    }


def cases_of_answers(
    answers: Sequence[Generated], wins: Sequence[float] | None
) -> dict[str, Cases]:
    """The measures of the answers; a verdict that is none has no case."""
    columns: dict[str, list[float]] = {
        "length": [float(len(a.ids) - a.ended) for a in answers],
        "unended": [float(not a.ended) for a in answers],
        "repetition": [repeated_share(a.ids) for a in answers],
    }
    if wins is not None:
        columns["win_rate"] = list(wins)
    return {
        name: {str(case): value for case, value in enumerate(values) if not math.isnan(value)}
        for name, values in columns.items()
    }
