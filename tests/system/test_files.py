"""Files and names by Windows' rules, and what other rooms make of them."""

from __future__ import annotations

import os
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace
from typing import Any

import pytest

from rmipo_lite.checkpoints import sealed_folder
from rmipo_lite.data.rows import load_rows
from rmipo_lite.model.model_files import existing_folder
from rmipo_lite.model.names import run_name
from rmipo_lite.system import files


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "sys", SimpleNamespace(platform="win32"))
    monkeypatch.setattr(files, "_WAITS", (0.0, 0.0))


def test_a_rename_waits_for_a_virus_scanner(
    windows: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    refusals, real = [PermissionError(13, "held")] * 2, os.replace

    def replace(source: Any, target: Any) -> None:
        if refusals:
            raise refusals.pop()
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    (tmp_path / "a").write_text("new", encoding="utf-8")
    (tmp_path / "b").write_text("old", encoding="utf-8")
    files.move(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text(encoding="utf-8") == "new"
    refusals.extend([PermissionError(13, "held")] * 3)
    with pytest.raises(PermissionError):
        files.move(tmp_path / "b", tmp_path / "a")


def test_where_one_file_is_held_open_none_is_replaced(
    windows: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = os.replace

    def replace(source: Any, target: Any) -> None:
        if Path(target) == tmp_path / "weights":
            raise PermissionError(13, "held")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    for name in ("config", "weights"):
        (tmp_path / name).write_text("old", encoding="utf-8")
    with pytest.raises(PermissionError, match=r"a program holds it open.*weights"):
        _put_in_place(tmp_path)
    found = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    assert found == {"config": "old", "weights": "old"}


def _put_in_place(folder: Path) -> None:
    with sealed_folder.files_put_in_place(folder) as staged:
        for name in ("config", "weights"):
            (staged / name).write_text("new", encoding="utf-8")


@pytest.mark.parametrize(
    "name", ["nul", "run/COM1", "run/aux.txt", "a:b", "what?", "run. ", "tab\there", "lpt²"]
)
def test_names_that_windows_has_for_itself_are_refused(windows: None, name: str) -> None:
    with pytest.raises(ValueError, match="output_dir: wanted a folder to write to"):
        sealed_folder.writable_folder(name)


@pytest.mark.parametrize("name", ["runs/console", "../community", "nullable", ".hidden", "a.b.c"])
def test_other_names_are_not(windows: None, name: str) -> None:
    assert sealed_folder.writable_folder(name) == Path(name)


def test_a_drive_is_no_forbidden_part(windows: None) -> None:
    assert not files.is_reserved(PureWindowsPath(r"C:\runs\one"))  # type: ignore[arg-type]
    assert files.is_reserved(PureWindowsPath(r"C:\runs\con"))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [r"C:\models\mine", "C:/models/mine", r"models\mine", "./mine"])
def test_a_windows_path_is_no_hub_name(name: str) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        existing_folder(name)
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        load_rows(name)


@pytest.mark.parametrize("name", ["org/model", "model", "org/model-v1.5"])
def test_a_hub_name_is_no_path(name: str) -> None:
    assert existing_folder(name) is None


def test_a_run_is_named_after_the_last_part_of_either_path() -> None:
    assert (
        run_name(r"C:\models\Qwen3-0.6B") == run_name("/models/Qwen3-0.6B/") == "rmipo-Qwen3-0.6B"
    )
    assert run_name("models/trailing.") == "rmipo-trailing"
