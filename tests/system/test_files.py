"""Files and names by Windows' rules, and what other rooms make of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace
from typing import Any
from unittest import mock

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


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder that holds what an earlier run saved, and a file of the user's."""
    folder = tmp_path / "saved"
    folder.mkdir()
    for name in ("config", "weights", "notes"):
        (folder / name).write_text("old", encoding="utf-8")
    return folder


def _save(folder: Path) -> None:
    with sealed_folder.files_put_in_place(folder) as staged:
        for name in ("added", "config", "weights"):
            (staged / name).write_text("new", encoding="utf-8")


_OLD = dict.fromkeys(("config", "weights", "notes"), "old")


def _texts(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}


def _put_in_place(folder: Path) -> dict[str, str]:
    try:
        _save(folder)
    finally:
        left = _texts(folder)
    return left


def _refusing(monkeypatch: pytest.MonkeyPatch, refused: Callable[[Path, Path], bool]) -> None:
    real = os.replace

    def replace(source: Any, target: Any) -> None:
        if refused(Path(source), Path(target)):
            raise PermissionError(13, "held", str(target))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)


def test_a_mapped_file_goes_aside_for_the_new_one(
    windows: None, monkeypatch: pytest.MonkeyPatch, saved: Path
) -> None:
    """As a model loaded from this folder maps it: it can be renamed, and not replaced."""
    _refusing(monkeypatch, lambda _, target: target == saved / "weights" and target.exists())
    new = dict.fromkeys(("added", "config", "weights"), "new")
    assert _put_in_place(saved) == {"notes": "old"} | new


@pytest.mark.parametrize("refused", ["config", "weights"])
def test_where_one_file_cannot_be_moved_none_is_new(
    windows: None, monkeypatch: pytest.MonkeyPatch, saved: Path, refused: str
) -> None:
    """An open file can't be renamed at all; and at whatever point a move fails."""
    _refusing(monkeypatch, lambda source, _: source == saved / refused)
    with pytest.raises(PermissionError):
        _put_in_place(saved)
    monkeypatch.undo()
    assert _texts(saved) == _OLD


def test_where_a_new_file_cannot_come_the_old_ones_come_back(
    windows: None, monkeypatch: pytest.MonkeyPatch, saved: Path
) -> None:
    _refusing(monkeypatch, lambda source, _: source.parent.name.startswith(".tmp")
              and source.name == "weights")  # fmt: skip
    with pytest.raises(PermissionError):
        _put_in_place(saved)
    assert _texts(saved) == _OLD


def test_ctrl_c_between_two_files_brings_the_old_ones_back(
    windows: None, monkeypatch: pytest.MonkeyPatch, saved: Path
) -> None:
    move = files.move

    def interrupted(source: Path, target: Path) -> None:
        move(source, target)
        if source.parent.name.startswith(".tmp") and source.name == "config":
            raise KeyboardInterrupt

    monkeypatch.setattr(files, "move", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _put_in_place(saved)
    assert _texts(saved) == _OLD


def test_what_cannot_come_back_at_once_stays_aside_and_comes_back_later(
    windows: None, monkeypatch: pytest.MonkeyPatch, saved: Path
) -> None:
    """New weights can't come, and something holds the old ones where they lie aside."""
    _refusing(monkeypatch, lambda source, _: source.name == "weights" and source.parent != saved)
    with pytest.raises(PermissionError):
        _save(saved)
    monkeypatch.undo()
    (aside,) = saved.glob(".old-save-*")
    aside.rename(saved / f".old-save-{2**22 + 1}")  # of a process that is gone
    sealed_folder.recover(saved)
    assert _texts(saved) == _OLD


def test_what_a_kill_left_aside_is_put_back(saved: Path) -> None:
    """A process died between putting files aside and bringing the new ones."""
    aside = saved / f".old-save-{2**22 + 1}"
    aside.mkdir()
    for name in ("config", "weights"):
        (saved / name).rename(aside / name)
    (saved / "config").write_text("newer", encoding="utf-8")
    sealed_folder.recover(saved)
    kept = _texts(saved)
    assert kept == {"config": "newer", "weights": "old", "notes": "old"}


def test_a_save_that_takes_long_is_still_in_use(tmp_path: Path) -> None:
    """The folder is old by its own times, as Windows tells them; what is written in it is not."""
    staged = tmp_path / f".tmp-checkpoint-5-{os.getppid()}"
    staged.mkdir()
    (staged / "model.safetensors").write_bytes(b"written a moment ago")
    os.utime(staged, (1, 1))
    real = os.stat_result

    def stat(path: Path, **options: Any) -> Any:
        found = os.stat(path, **options)
        return real((*found[:9], found.st_mtime)) if path == staged else found

    with mock.patch.object(Path, "stat", stat):
        sealed_folder.recover(tmp_path)
    assert staged.is_dir()


def test_what_a_file_manager_leaves_is_nothing(tmp_path: Path) -> None:
    for name in (".DS_Store", "desktop.ini", "Thumbs.db"):
        (tmp_path / name).write_text("", encoding="utf-8")
    assert files.is_empty(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    assert not files.is_empty(tmp_path)


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
    assert not files.is_reserved(PureWindowsPath(r"C:\runs\one"))
    assert files.is_reserved(PureWindowsPath(r"C:\runs\con"))


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


def test_a_file_is_there_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "file"

    def write(text: str, fault: BaseException | None = None) -> None:
        with files.file_put_in_place(target) as staged:
            staged.write_text(text)
            if fault is not None:
                raise fault

    with pytest.raises(OSError, match="disk"):
        write("half", OSError("disk"))
    assert not list(target.parent.iterdir())
    write("whole")
    with pytest.raises(KeyboardInterrupt):
        write("half", KeyboardInterrupt())
    assert [(file.name, file.read_text()) for file in target.parent.iterdir()] == [
        ("file", "whole")
    ]
