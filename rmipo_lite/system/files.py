"""Files and their names, where Windows has other rules."""

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Tries of a rename on Windows, whose virus scanner holds a fresh file for a moment; seconds.
_WAITS = (0.01, 0.03, 0.1, 0.3, 1.0) if sys.platform == "win32" else ()
_OF_FILE_MANAGERS = (".ds_store", "desktop.ini", "thumbs.db")
# A device's name with any ending, a character, or an end that a name can't have there.
_FORBIDDEN = re.compile(
    r"^(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³]) *(\.|$)"
    r'|[<>:"|?*\x00-\x1f]|[. ]$', re.IGNORECASE
)  # fmt: skip


def sync_folder(folder: Path) -> None:
    """Wait until a folder's list of names is on the disk; Windows has no such call."""
    if sys.platform == "win32":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def move(source: Path, target: Path) -> None:
    """Rename; a file takes the place of the one that is there.

    Raises:
        OSError: on Windows also where somebody holds either open.
    """
    for wait in _WAITS:
        try:
            os.replace(source, target)
            return
        except PermissionError:
            time.sleep(wait)
    os.replace(source, target)


@contextmanager
def file_put_in_place(target: Path) -> Iterator[Path]:
    """Where to write a file that is at `target` once the block is done, whole; else nowhere."""
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        yield staged
        move(staged, target)
    finally:
        staged.unlink(missing_ok=True)


def write_whole(target: Path, text: str) -> None:
    """The text as the file, or, where that fails, what was there before."""
    with file_put_in_place(target) as staged:
        staged.write_text(text, encoding="utf-8")


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file; {} where there is no such file, or no object in it.

    Raises:
        ValueError: the file is damaged; names it.
    """
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    return found if isinstance(found, dict) else {}


def refuse_existing(*targets: Path) -> None:
    """Raise FileExistsError where there is such a file: nothing of somebody's is written over."""
    for target in targets:
        if target.exists():
            raise FileExistsError(f"path: {target} is there already; name a new file")


def files_below(folder: Path) -> list[Path]:
    """Every file in a folder and in those inside it, in order of their names."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def put_in_place(source: Path, folder: Path, *, aside: Path) -> None:
    """Move the files below one folder to their places below another, all or none of them.

    On Windows a file can be held mapped by the model that was loaded from it: it can be renamed,
    but not replaced. So there what stands in the places goes aside first, and comes back if
    anything fails; `put_back` does that after a kill, or where it could not come back at once.

    Raises:
        OSError: what is in the way; nothing has changed.
    """
    files = files_below(source)
    targets = [folder / path.relative_to(source) for path in files]
    for target in targets:
        target.parent.mkdir(parents=True, exist_ok=True)
    if sys.platform != "win32":
        for path, target in zip(files, targets, strict=True):
            move(path, target)
        return
    placed: list[Path] = []
    try:
        for target in filter(Path.exists, targets):
            kept = aside / target.relative_to(folder)
            kept.parent.mkdir(parents=True, exist_ok=True)
            move(target, kept)
        for path, target in zip(files, targets, strict=True):
            placed.append(target)
            move(path, target)
    except BaseException:  # Ctrl-C too
        for target in placed:
            target.unlink(missing_ok=True)
        put_back(aside, folder)
        shutil.rmtree(aside, ignore_errors=True)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def put_back(aside: Path, folder: Path) -> None:
    """Move what `put_in_place` put aside to its places, where nothing else has come."""
    for path in files_below(aside):
        target = folder / path.relative_to(aside)
        if not target.exists():
            move(path, target)


def is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing but what a file manager leaves in it."""
    return all(path.name.lower() in _OF_FILE_MANAGERS for path in folder.iterdir())


def is_reserved(path: Path) -> bool:
    """Whether Windows, where this is it, takes a part of the path for a device or forbids it."""
    if sys.platform != "win32":
        return False
    parts = path.parts[1:] if path.anchor else path.parts
    return any(_FORBIDDEN.search(part) for part in parts if part not in (".", ".."))


def looks_like_path(name: str) -> bool:
    """Whether a name can only be a path, on any system: `./x`, `~/x`, `a/b/c`, `C:\\x`, `a\\b`."""
    return (
        name.startswith((".", "/", "~"))
        or "\\" in name
        or re.match(r"[A-Za-z]:", name) is not None
        or name.count("/") > 1
    )
