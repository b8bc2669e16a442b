"""`run_log.json` of a run's folder: its log, and every held-out pair before and after training.

Numbers alone. It is what figures are drawn from without loading a model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rmipo_lite.output.uncertainty import PairedValues

FILE = "run_log.json"
Columns = Mapping[str, Mapping[Hashable, float]]  # name -> case -> value


class RunNumbers(NamedTuple):
    """What a run logged, and what it measured of every held-out pair before and after."""

    history: list[dict[str, float]]
    before: Columns
    after: Columns


def write_numbers(
    folder: Path, history: Sequence[Mapping[str, Any]], held_out: PairedValues
) -> None:
    """Into the folder's file; what is no number is null, as JSON wants it."""
    kept = {
        "history": [{name: _json(value) for name, value in line.items()} for line in history],
        "held_out": {"before": _columns(held_out.first), "after": _columns(held_out.newest)},
    }
    (folder / FILE).write_text(json.dumps(kept) + "\n", encoding="utf-8")


def read_numbers(folder: Path) -> RunNumbers:
    """What `write_numbers` wrote.

    Raises:
        FileNotFoundError: the folder has no such file, as of a run that isn't over.
        ValueError: the file is damaged.
    """
    file = folder / FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} has no {FILE}, which a run writes at its end: name a run's folder"
        )
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        history = [
            {name: math.nan if value is None else value for name, value in line.items()}
            for line in kept["history"]
        ]
        before, after = (
            {name: dict(cases) for name, cases in kept["held_out"][side].items()}
            for side in ("before", "after")
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged: {type(error).__name__}: {error}") from error
    return RunNumbers(history, before, after)


def _columns(values: Columns) -> dict[str, dict[str, float]]:
    return {
        name: {str(case): value for case, value in cases.items()} for name, cases in values.items()
    }


def _json(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
