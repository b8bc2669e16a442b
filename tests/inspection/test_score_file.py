"""The file of scores: what was written is read to the last bit, what was cut is scored again."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rmipo_lite.inspection.score_file import LENGTHS, NUMBERS, SCORES_FILE, Numbers, ScoreFile

HEADER = {"model": "abc", "model_name": "tiny", "dataset": {"rows": 9}, "options": {"beta": 2.0}}


def numbers(seed: int, **changes: float) -> Numbers:
    drawn = np.random.default_rng(seed).normal(size=len(NUMBERS)).astype(np.float32)
    values = dict(zip(NUMBERS, map(float, drawn), strict=True))
    return dict.fromkeys(LENGTHS, 7 + seed) | values | changes


def written(folder: Path, count: int = 3, **changes: float) -> Path:
    file = ScoreFile(folder, HEADER)
    assert file.begin(64, True) == (64, True)
    for row in range(count):
        file.add([row], [numbers(row, **changes)])
    file.sync()
    return folder / SCORES_FILE


def test_every_float32_comes_back(tmp_path: Path) -> None:
    written(tmp_path, 200)
    file = ScoreFile(tmp_path, HEADER)
    assert len(file) == 200
    for row in range(200):
        assert file.numbers(row) == numbers(row)


def test_no_number_is_null_and_comes_back_as_nan(tmp_path: Path) -> None:
    path = written(tmp_path, 1, loss=math.inf, chosen_pmi=math.nan)
    line = json.loads(path.read_text().splitlines()[1])
    assert (line["loss"], line["chosen_pmi"]) == (None, None)
    read = ScoreFile(tmp_path, HEADER).numbers(0)
    assert math.isnan(read["loss"])
    assert math.isnan(read["chosen_pmi"])


def test_how_pairs_were_cut_is_kept(tmp_path: Path) -> None:
    written(tmp_path)
    assert ScoreFile(tmp_path, HEADER).begin(9999, False) == (64, True)


@pytest.mark.parametrize("left", range(1, 60, 7))
def test_a_cut_last_line_is_taken_off(tmp_path: Path, left: int) -> None:
    path = written(tmp_path)
    whole = path.read_bytes()
    last = whole.rstrip(b"\n").rindex(b"\n") + 1
    path.write_bytes(whole[: last + left])
    file = ScoreFile(tmp_path, HEADER)
    assert [row in file for row in range(3)] == [True, True, False]
    file.add([2], [numbers(2)])
    assert path.read_bytes() == whole


WRONG_TYPE = json.dumps({"row": 1, **dict.fromkeys((*LENGTHS, *NUMBERS), "x")}).encode()


@pytest.mark.parametrize(
    "line", [b"\0" * 40, b"[]", b"{}", b'{"row": 1}', b"\xff", b"", WRONG_TYPE]
)
def test_what_follows_an_unreadable_line_is_scored_again(tmp_path: Path, line: bytes) -> None:
    path = written(tmp_path)
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([*lines[:2], line, *lines[3:]]))
    file = ScoreFile(tmp_path, HEADER)
    assert [row in file for row in range(3)] == [True, False, False]
    assert path.read_bytes() == b"\n".join([*lines[:2], b""])


def test_a_file_that_ends_inside_its_header_begins_anew(tmp_path: Path) -> None:
    path = written(tmp_path, 0)
    whole = path.read_bytes()
    path.write_bytes(whole[:20])
    file = ScoreFile(tmp_path, HEADER)
    assert len(file) == 0
    assert file.begin(64, True) == (64, True)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": {"rows": 8}}, r'of other dataset \({"rows": 9} there, {"rows": 8} now'),
        ({"options": {"beta": 1.0}}, r'other options \({"beta": 2.0} there, {"beta": 1.0} now'),
        ({"model": "x", "model_name": "big"}, r'other model \("tiny" there, "big" now'),
    ],
)
def test_scores_of_something_else_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = written(tmp_path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        ScoreFile(tmp_path, HEADER | changes)
    assert path.read_bytes() == before


def test_the_same_model_under_another_name_goes_on(tmp_path: Path) -> None:
    written(tmp_path)
    assert len(ScoreFile(tmp_path, HEADER | {"model_name": "./tiny"})) == 3


@pytest.mark.parametrize("content", [b"hello\nthere\n", b"{}\n", b"[1]\n"])
def test_another_file_is_refused_and_left(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / SCORES_FILE
    path.write_bytes(content)
    with pytest.raises(ValueError, match="no file of pair scores"):
        ScoreFile(tmp_path, HEADER)
    assert path.read_bytes() == content


def test_without_a_folder_nothing_is_written() -> None:
    file = ScoreFile(None, {})
    assert file.begin(64, False) == (64, False)
    file.add([0], [numbers(0)])
    file.sync()
    assert 0 not in file


def test_a_disk_that_fails_costs_the_file_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path, 1)
    file = ScoreFile(tmp_path, HEADER)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", _full)
        file.add([1], [numbers(1)])
    file.add([2], [numbers(2)])
    file.sync()
    assert "no longer written: [Errno 28] No space left" in capsys.readouterr().out
    assert len(ScoreFile(tmp_path, HEADER)) == 1


def _full(*args: object, **kwargs: object) -> None:
    raise OSError(28, "No space left on device")
