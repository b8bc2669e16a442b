"""The file of pair scores: a header that says of what, then a JSON line for each pair.

Lines are appended as soon as they are known, so an interrupted run goes on where it stopped. A line
that a kill or a power cut left unfinished is taken off the file.
"""

import json
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rmipo_lite.checkpoints.sealed_folder import sync_file
from rmipo_lite.output.console import say

SCORES_FILE = "pair_scores.jsonl"
FORMAT = 2
NAME = "model_name"  # of the header: told, not compared
LENGTHS = ("prompt_length", "chosen_length", "rejected_length")  # tokens; of responses the scored
NUMBERS = (
    "chosen_logps", "rejected_logps", "chosen_prior_logps", "rejected_prior_logps",
    "chosen_pmi", "rejected_pmi", "pmi_gap", "gamma", "loss", "weight",
    "chosen_reward", "rejected_reward",
)  # fmt: skip
_COLUMNS = (*LENGTHS, *NUMBERS)

Numbers = dict[str, float]  # a value for each of LENGTHS and NUMBERS


class ScoreFile:
    """The folder's file of scores: a header that says of what, then a line for each pair.

    Args:
        folder: made when missing; None keeps nothing.
        header: what the scores depend on, as JSON-able values.

    Raises:
        ValueError: the file holds scores of something else, or is no such file.
    """

    def __init__(self, folder: Path | None, header: dict[str, Any]) -> None:
        self._path = None if folder is None else folder / SCORES_FILE
        self._header = {"scores": FORMAT, **header}
        self._micro_step: dict[str, Any] = {}
        self._places: dict[int, int] = {}  # row -> which of the lines in `_table`
        self._table = array("f")  # the lines' values behind each other
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._path.is_file():
                self._read(self._path)

    def __contains__(self, row: int) -> bool:
        return row in self._places

    def __len__(self) -> int:
        return len(self._places)

    def numbers(self, row: int) -> Numbers:
        """What an earlier call found of a row."""
        start = self._places[row] * len(_COLUMNS)
        values = self._table[start : start + len(_COLUMNS)]
        return dict(zip(_COLUMNS, values, strict=True))

    def _read(self, path: Path) -> None:
        """Take over what is sound; a last line that was cut is taken off the file."""
        with path.open("rb+") as file:
            line = file.readline()
            if not line.endswith(b"\n"):
                return  # it ends inside its header: it is written anew
            found = _parsed(line)
            if found is None or "scores" not in found:
                raise ValueError(f"output_dir: {path} is no file of pair scores; name another")
            self._micro_step = found.pop("micro_step", {})
            self._refuse_other(path, found)
            size = len(line)
            for line in file:
                if not self._take(line):
                    break
                size += len(line)
            file.truncate(size)

    def _take(self, line: bytes) -> bool:
        """Whether a line is whole and holds a pair."""
        found = _parsed(line) if line.endswith(b"\n") else None
        if found is None or not {"row", *_COLUMNS} <= found.keys():
            return False
        try:
            row = int(found["row"])
            values = array("f", [np.nan if found[n] is None else found[n] for n in _COLUMNS])
        except (TypeError, ValueError, OverflowError):
            return False
        if row not in self._places:
            self._places[row] = len(self._places)
            self._table += values
        return True

    def _refuse_other(self, path: Path, found: dict[str, Any]) -> None:
        wanted = json.loads(json.dumps(self._header))
        # A folder's name may be told in several ways: the weights say which model it is.
        others = [n for n in wanted if n != NAME and found.get(n) != wanted[n]]
        if others:
            first = NAME if others[0] == "model" else others[0]
            there, now = _difference(found.get(first), wanted.get(first))
            raise ValueError(
                f"output_dir: {path} holds the scores of other {' and '.join(others)} ({there} "
                f"there, {now} now); name another folder, or remove the file"
            )

    def begin(self, max_tokens: int, packing: bool) -> tuple[int, bool]:
        """How pairs are cut into micro-steps: as an earlier call did, or this, noted in the file.

        The last bits of a pair's numbers depend on it.
        """
        if not self._micro_step:
            self._micro_step = {"max_tokens": max_tokens, "packing": packing}
            if self._path is not None:
                line = json.dumps(self._header | {"micro_step": self._micro_step}) + "\n"
                self._path.write_text(line, encoding="utf-8")
        return int(self._micro_step["max_tokens"]), bool(self._micro_step["packing"])

    def add(self, rows: Sequence[int], numbers: Sequence[Numbers]) -> None:
        """Append the pairs that aren't there; a disk that is full costs the file, not the run."""
        if self._path is None:
            return
        lines = [
            json.dumps({"row": row} | {n: _json(v) for n, v in values.items()}) + "\n"
            for row, values in zip(rows, numbers, strict=True)
            if row not in self
        ]
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write("".join(lines))
        except OSError as error:
            say(f"WARNING: {self._path} is no longer written: {error}")
            self._path = None

    def sync(self) -> None:
        if self._path is not None:
            sync_file(self._path)


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _json(value: float) -> float | int | None:
    """The shortest number that is the same float32; None where it is none: JSON has no NaN."""
    if isinstance(value, int):
        return value
    return float(f"{value:.9g}") if np.isfinite(value) else None


def _difference(there: Any, now: Any) -> tuple[str, str]:
    """What differs, in words short enough for an error."""
    if isinstance(there, dict) and isinstance(now, dict):
        names = [name for name in now if there.get(name) != now[name]]
        there, now = ({name: value.get(name) for name in names} for value in (there, now))
    shown = [json.dumps(value) for value in (there, now)]
    first, second = (text if len(text) <= 90 else text[:86] + " ..." for text in shown)
    return first, second
