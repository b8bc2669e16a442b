"""Several datasets as one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rmipo_lite.data.rows import load_rows
from tests.kit import chat_row, text_row


def _file(path: Path, name: str, count: int, **more: Any) -> Path:
    rows = [{**text_row(f"{name} {i}", "yes", "no"), **more} for i in range(count)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return _file(tmp_path / "a.jsonl", "a", 100), _file(tmp_path / "b.jsonl", "b", 30, id=1)


def _counts(rows: Any) -> dict[str, int]:
    names = [row.prompt.split()[0] for row in rows]
    return {name: names.count(name) for name in dict.fromkeys(names)}


def test_names_and_paths_one_after_another(files: tuple[Path, Path]) -> None:
    rows, report = load_rows([files[0], str(files[1])])
    assert _counts(rows) == {"a": 100, "b": 30}
    assert [row.index for row in rows] == list(range(130))
    assert report.source == f"{files[0]} (100 of 100 rows) + {files[1]} (30 of 30 rows)"
    assert "rows 100 to 129: b.jsonl" in report.read_as
    assert report.ignored_columns == ["id"]


@pytest.mark.parametrize(
    ("shares", "counts"),
    [((0.5, 0.5), (30, 30)), ((3, 1), (90, 30)), ((9, 1), (100, 11)), ((1, 1000), (1, 30))],
)
def test_shares_hold_and_no_row_comes_twice(
    shares: tuple[float, float], counts: tuple[int, int], files: tuple[Path, Path]
) -> None:
    mixed = list(zip(files, shares, strict=True))
    rows, report = load_rows(mixed)
    assert tuple(_counts(rows).values()) == counts
    assert report.duplicate_rows == 0
    again, _ = load_rows(mixed)
    assert [row.prompt for row in again] == [row.prompt for row in rows]
    assert f"({counts[0]} of 100 rows)" in report.source


def test_parts_may_have_another_form_each(files: tuple[Path, Path], tmp_path: Path) -> None:
    chats = [chat_row("Hello?", "Hi.", "No.")]
    rows, _ = load_rows([(str(files[1]), 1), (chats, 1)])
    assert [type(row.prompt) for row in rows] == [str, list]
    other = tmp_path / "other.jsonl"
    other.write_text('{"question": "a", "chosen": "b", "rejected": "c"}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"Nearest match: dataset.rename_columns"):
        load_rows([files[0], other])


@pytest.mark.parametrize(
    ("mixture", "words"),
    [
        ([("a", 1), "b"], "a share for every part, or for none"),
        ([("a", 0), ("b", 1)], r"shares must be numbers > 0, got \[0.0, 1.0\]"),
        ([("a", 1), ("b", float("nan"))], "shares must be numbers > 0"),
    ],
)
def test_bad_shares(mixture: Any, words: str, files: tuple[Path, Path]) -> None:
    named = [
        (str(files[0]), part[1]) if isinstance(part, tuple) else str(files[0]) for part in mixture
    ]
    with pytest.raises(ValueError, match=words):
        load_rows(named)
