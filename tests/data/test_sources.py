"""Folders of files and formatted datasets: what is read is the split that was meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from rmipo_lite.data.rows import load_rows

_HASHED = "train-00000-of-00001-a09b74b3ef9c3b56.parquet"


def _row(text: str) -> dict[str, str]:
    return {"prompt": text, "chosen": "yes", "rejected": "no"}


def _folder(path: Path, names: list[str]) -> Path:
    """A folder of these files, each with one row whose prompt is the file's name."""
    for name in names:
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("parquet"):
            datasets.Dataset.from_list([_row(name)]).to_parquet(file)
        else:
            file.write_text(json.dumps(_row(name)))
    return path


@pytest.mark.parametrize(
    ("names", "read", "split"),
    [
        (["training.jsonl", "validation.jsonl"], ["training.jsonl"], "[train]"),
        (["preferences.jsonl", "test.jsonl"], ["preferences.jsonl"], "[train]"),
        (["my_pairs.parquet", "eval_pairs.parquet"], ["my_pairs.parquet"], "[train]"),
        (["Train.jsonl", "Test.jsonl"], ["Train.jsonl"], "[train]"),
        (["Train.JSONL", "more.jsonl"], ["Train.JSONL"], "[train]"),
        (["pairs_train.jsonl", "pairs_test.jsonl"], ["pairs_train.jsonl"], "[train]"),
        (["a-Train-1.jsonl", "b.train.jsonl", "c dev.jsonl"], None, "[train]"),
        (["train_prefs-00000-of-00002.jsonl", "train_prefs-00001-of-00002.jsonl"], None, "_prefs]"),
        ([_HASHED, "test-00000-of-00001-b09b74b3ef9c3b56.parquet"], [_HASHED], "[train]"),
        (["pairs_test.jsonl"], ["pairs_test.jsonl"], "[test]"),
        (["contest.jsonl", "trainee.jsonl"], ["contest.jsonl", "trainee.jsonl"], ""),
        (["train/part-0.jsonl", "test/part-0.jsonl"], ["train/part-0.jsonl"], "[train]"),
        (["data/Training/a.jsonl", "data/val/a.jsonl"], ["data/Training/a.jsonl"], "[train]"),
        (["a.jsonl", "test/b.jsonl"], ["a.jsonl"], ""),
        (["._train.jsonl", "train.jsonl"], ["train.jsonl"], "[train]"),  # as a Mac leaves them
    ],
)
def test_the_split_that_names_tell(
    tmp_path: Path, names: list[str], read: list[str] | None, split: str
) -> None:
    rows, report = load_rows(_folder(tmp_path / "pairs", names))
    assert [row.prompt for row in rows] == (names[:2] if read is None else read)
    assert report.source.endswith(split or "pairs")


def test_files_without_a_split_beside_train_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, _ = load_rows(_folder(tmp_path, ["train.jsonl", "extra.jsonl", "test.jsonl"]))
    assert [row.prompt for row in rows] == ["train.jsonl"]
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("Not read")
    assert line.endswith(": extra.jsonl")


def test_other_files_are_no_train_split_beside_train_prefs(tmp_path: Path) -> None:
    folder = _folder(tmp_path, ["train_prefs.jsonl", "test_prefs.jsonl", "extra.jsonl"])
    with pytest.raises(ValueError, match=r"no split called train .*such as split='train_prefs'"):
        load_rows(folder)
    assert load_rows(folder, split="test_prefs").rows[0].prompt == "test_prefs.jsonl"


@pytest.mark.parametrize("name", ["pandas", "arrow", "numpy", None])
@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_format_that_changes_the_container_alone(name: str | None, is_streamed: bool) -> None:
    row: dict[str, Any] = {**_row("q"), "system": "Be kind."}
    dataset = datasets.Dataset.from_list([row])
    streamed = dataset.to_iterable_dataset().select_columns(list(_row("q")))
    kept = streamed if is_streamed else dataset
    columns = {} if is_streamed else {"columns": list(_row("q"))}
    rows, _ = load_rows(kept.with_format(name, **columns))
    assert [(row.prompt, row.chosen, row.rejected) for row in rows] == [("q", "yes", "no")]


def test_a_transform_holds() -> None:
    def shout(batch: dict[str, list[str]]) -> dict[str, list[str]]:
        return {name: [text.upper() for text in texts] for name, texts in batch.items()}

    rows, _ = load_rows(datasets.Dataset.from_list([_row("q")]).with_transform(shout))
    assert (rows[0].prompt, rows[0].chosen) == ("Q", "YES")
    shown = datasets.Dataset.from_list([_row("q")])
    shown.set_format("pandas", columns=["prompt"], output_all_columns=True)
    assert load_rows(shown).rows[0].chosen == "yes"
