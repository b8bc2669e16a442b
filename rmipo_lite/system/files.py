"""Files and their names, where Windows has other rules."""

import os
import re
import sys
import time
from pathlib import Path

# Tries of a rename on Windows, whose virus scanner holds a fresh file for a moment; seconds.
_WAITS = (0.01, 0.03, 0.1, 0.3, 1.0) if sys.platform == "win32" else ()
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


def check_replaceable(file: Path) -> None:
    """Refuse a file that can't be replaced because somebody holds it open, as Windows has it.

    Raises:
        PermissionError: it is held open, by whom can't be told.
    """
    if not file.exists():
        return
    try:
        move(file, file)
    except PermissionError as error:
        raise PermissionError(
            error.errno,
            "it can't be replaced while a program holds it open, for instance a model that was "
            "loaded from it",
            str(file),
        ) from error


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
