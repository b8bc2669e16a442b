"""A comparison's folder: what it is of, what the model said as it came, a folder a run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rmipo_lite.checkpoints.sealed_folder import newest_valid_checkpoint, writable_folder
from rmipo_lite.comparing.outcome import write_json
from rmipo_lite.model.generation import Answer
from rmipo_lite.model.names import new_folder, run_name
from rmipo_lite.system.files import is_empty

_FILE = "comparison.json"


def answer_of(text: str, ended: bool) -> Answer:
    """An answer from its two parts."""
    answer = Answer(text)
    answer.ended = ended
    return answer


def folder_for(model: Any, output_dir: str | Path | None) -> Path:
    """The comparison's folder; a new one where none is named.

    Raises:
        FileExistsError: it holds something else.
    """
    if output_dir is None:
        return new_folder(run_name(model).replace("rmipo-", "rmipo-compare-", 1))
    folder = writable_folder(output_dir)
    if folder.is_dir() and not is_empty(folder) and not (folder / _FILE).is_file():
        raise FileExistsError(
            f"output_dir: {folder} isn't empty and holds no comparison; name a new folder"
        )
    return folder


def open_folder(folder: Path, identity: dict[str, Any]) -> dict[int, list[Answer]]:
    """The folder's answers of the model as it came, by seed; a new folder is begun.

    Raises:
        ValueError: it holds a comparison on other pairs or with other options.
    """
    file = folder / _FILE
    if not file.is_file():
        write_json(file, {"identity": identity, "before": {}})
        return {}
    kept = json.loads(file.read_text(encoding="utf-8"))
    for name, value in identity.items():
        there = kept["identity"].get(name)
        if there != value:
            raise ValueError(
                f"output_dir: {folder} holds a comparison of another kind: {name} is {there!r} "
                f"there and {value!r} here; name a new folder"
            )
    return {
        int(seed): [answer_of(text, ended) for text, ended in answers]
        for seed, answers in kept["before"].items()
    }


def note_before(folder: Path, before: Mapping[int, Sequence[Answer]]) -> None:
    """Keep the answers of the model as it came."""
    file = folder / _FILE
    kept = json.loads(file.read_text(encoding="utf-8"))
    kept["before"] = {
        str(seed): [[str(answer), answer.ended] for answer in answers]
        for seed, answers in before.items()
    }
    write_json(file, kept)


def ready_for_a_run(folder: Path) -> bool:
    """Whether a run stopped there goes on from a checkpoint.

    What one left without a checkpoint is cleared away: the run is made anew.
    """
    if not folder.is_dir() or is_empty(folder):
        return False
    newest, _ = newest_valid_checkpoint(folder)
    if newest is None:
        shutil.rmtree(folder)
    return newest is not None
