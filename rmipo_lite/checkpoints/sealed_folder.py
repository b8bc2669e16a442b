"""A checkpoint folder that is whole or isn't there: staging, manifest, verification, rotation.

A process can die at any instruction and a disk can fill at any write. So a checkpoint is written
into a hidden folder beside its place, every file is synced, `manifest.json` with the size and
SHA-256 of every file is written last, and one rename makes it visible. What carries no manifest,
or doesn't match it, isn't a checkpoint. Deleting renames away first, for the same reason.

Hidden names, all holding the writer's process id: `.tmp-checkpoint-N-pid` is being written,
`.old-checkpoint-N-pid` is the predecessor of the same step during the swap (and is put back if
the swap never finished), `.trash-checkpoint-N-pid` is being deleted. `.tmp-save-pid` holds loose
files (the final adapter) on their way into the folder, `.old-save-pid` on Windows those that were
there (put back if the new ones never came).
"""

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from rmipo_lite.output.console import say
from rmipo_lite.system.files import (
    files_below,
    is_reserved,
    move,
    put_back,
    put_in_place,
    sync_folder,
)
from rmipo_lite.system.processes import is_running

MANIFEST = "manifest.json"
FORMAT = 1
_FRESH_SECONDS = 600.0
_NAME = re.compile(r"^checkpoint-(\d+)$")
_HIDDEN = re.compile(r"^\.(tmp|old|trash)-(checkpoint-\d+|save)-(\d+)$")


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or can't be written; the message names file and reason."""


def writable_folder(output_dir: str | Path) -> Path:
    """The folder, which need not be there.

    Raises:
        ValueError: it is a file, or no name for a folder.
    """
    folder = Path(output_dir)
    if folder.is_file() or not str(folder).isprintable() or is_reserved(folder):
        raise ValueError(f"output_dir: wanted a folder to write to, got {str(folder)[:80]!r}")
    return folder


def sync_file(path: Path) -> None:
    """Wait until a file is on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _files(folder: Path) -> list[Path]:
    return [path for path in files_below(folder) if path.name != MANIFEST]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _manifest_text(content: dict[str, Any]) -> str:
    """The only accepted form of a manifest: any change of a byte changes text or digest."""
    body = {k: v for k, v in content.items() if k != "manifest_sha256"}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "manifest_sha256": digest}, sort_keys=True, indent=1) + "\n"


def seal(folder: Path, *, step: int, run_id: str, resumable: bool) -> None:
    """Sync every file of `folder`, then write and sync its manifest.

    Args:
        folder: the staged checkpoint.
        step: optimizer steps done.
        run_id: identity of the run, so that rotation and resume never mix two runs in a folder.
        resumable: False when only the weights were saved.
    """
    listed: dict[str, dict[str, Any]] = {}
    for path in _files(folder):
        sync_file(path)
        name = path.relative_to(folder).as_posix()
        listed[name] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    content = {
        "format": FORMAT,
        "step": step,
        "run_id": run_id,
        "resumable": resumable,
        "saved_at": time.time(),  # seconds since 1970
        "files": listed,
    }
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        file.write(_manifest_text(content))
        file.flush()
        os.fsync(file.fileno())
    for sub in {p.parent for p in _files(folder)} | {folder}:
        sync_folder(sub)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, checked in itself. Raises CheckpointError."""
    path = folder / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
    except FileNotFoundError:
        why = "is missing: the save was cut short, or another program wrote this folder"
        raise CheckpointError(f"{folder.name}/{MANIFEST} {why}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder.name}/{MANIFEST} can't be read: {error}") from error
    if not isinstance(content, dict) or text != _manifest_text(content):
        raise CheckpointError(f"{folder.name}/{MANIFEST} was changed after it was written")
    if content.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder.name}/{MANIFEST} has format {content.get('format')!r}, wanted {FORMAT}: "
            "it was written by another version of rmipo_lite"
        )
    return content


def verify_checkpoint(path: str | Path) -> None:
    """Check every file of a checkpoint against its manifest.

    Raises CheckpointError naming the file and what is wrong: missing, another size, another hash,
    a name that leaves the folder, or a folder renamed to another step.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder")
    content = read_manifest(folder)
    name = _NAME.match(folder.name)
    if name is not None and int(name[1]) != content["step"]:
        raise CheckpointError(f"{folder.name} holds step {content['step']}: it was renamed")
    for relative, wanted in content["files"].items():
        file = folder / relative
        if Path(relative).is_absolute() or ".." in Path(relative).parts or file.is_symlink():
            raise CheckpointError(f"{folder.name}: {relative!r} leaves the checkpoint's folder")
        if not file.is_file():
            raise CheckpointError(f"{folder.name}/{relative} is missing")
        size = file.stat().st_size
        if size != wanted["size"]:
            raise CheckpointError(
                f"{folder.name}/{relative} has {size} bytes, wanted {wanted['size']}"
            )
        if _sha256(file) != wanted["sha256"]:
            raise CheckpointError(f"{folder.name}/{relative} has another SHA-256 than when saved")


def checkpoints(output_dir: str | Path) -> list[Path]:
    """All folders named `checkpoint-N`, in order of N, whatever their state."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if p.is_dir() and _NAME.match(p.name)]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def newest_valid_checkpoint(output_dir: str | Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest checkpoint that verifies, and what was passed over on the way, with reasons.

    Newest means: of the run that saved last, the highest step. So the `checkpoint-1000` of an
    older run in a reused folder doesn't hide the new run's `checkpoint-20`. Weights-only
    checkpoints (`save_only_model=True`) can't be resumed and are passed over.
    """
    recover(Path(output_dir))
    skipped: list[tuple[Path, str]] = []
    readable: list[tuple[Path, dict[str, Any]]] = []
    for path in checkpoints(output_dir):
        try:
            readable.append((path, read_manifest(path)))
        except CheckpointError as error:
            skipped.append((path, str(error)))
    last_save: dict[str, float] = {}
    for _, content in readable:
        run = content["run_id"]
        last_save[run] = max(last_save.get(run, 0.0), content["saved_at"])
    readable.sort(key=lambda item: (last_save[item[1]["run_id"]], item[1]["step"]), reverse=True)
    for path, content in readable:
        if not content["resumable"]:
            skipped.append((path, f"{path.name} holds only weights (save_only_model=True)"))
            continue
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            skipped.append((path, str(error)))
            continue
        return path, skipped
    return None, skipped


def _in_use(path: Path, pid: int) -> bool:
    """Whether another live process may be working on a hidden folder.

    A process id is reused, in containers often at once, so a live one counts only while the
    folder is fresh.
    """
    if pid == os.getpid():
        return False  # this process writes one checkpoint at a time: what it left is a leftover
    stats = [each.stat() for each in (path, *path.rglob("*"))]
    newest = max(max(stat.st_ctime, stat.st_mtime) for stat in stats)
    return is_running(pid) and time.time() - newest < _FRESH_SECONDS


def recover(output_dir: Path) -> None:
    """Tidy what a killed process left: finish or undo its swap, remove half-written folders."""
    if not output_dir.is_dir():
        return
    for path in output_dir.iterdir():
        name = _HIDDEN.match(path.name)
        if name is None or not path.is_dir() or _in_use(path, int(name[3])):
            continue
        target = output_dir / name[2]
        if name[1] == "old" and name[2] == "save":
            put_back(path, output_dir)
        elif name[1] == "old" and not target.exists():
            move(path, target)
        shutil.rmtree(path, ignore_errors=True)  # what is left of it


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint so that no half-deleted one is ever seen under its name."""
    trash = checkpoint.with_name(f".trash-{checkpoint.name}-{os.getpid()}")
    shutil.rmtree(trash, ignore_errors=True)
    move(checkpoint, trash)
    shutil.rmtree(trash, ignore_errors=True)


def _publish(staged: Path, target: Path) -> None:
    old = target.with_name(f".old-{target.name}-{os.getpid()}")
    if target.exists():
        move(target, old)
        os.utime(old)  # it is in use: a rename doesn't say so everywhere
    move(staged, target)
    sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def files_put_in_place(folder: Path) -> Iterator[Path]:
    """A hidden folder to write loose files into; at the end they are synced and moved to `folder`.

    So a full disk, a kill or Ctrl-C while writing leaves what was there before, whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    recover(folder)
    staged = folder / f".tmp-save-{os.getpid()}"
    staged.mkdir()
    try:
        yield staged
        for path in _files(staged):
            sync_file(path)
        put_in_place(staged, folder, aside=folder / f".old-save-{os.getpid()}")
        sync_folder(folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


@contextmanager
def staged_checkpoint(
    target: Path, *, step: int, run_id: str, resumable: bool = True
) -> Iterator[Path]:
    """Write a checkpoint in the yielded folder; on leaving it is sealed, renamed and verified.

    Whatever goes wrong inside (a full disk, an interrupt), the folder is removed and `target`
    stays as it was. A write error becomes a CheckpointError that says how much was needed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    recover(target.parent)
    folder = target.with_name(f".tmp-{target.name}-{os.getpid()}")
    folder.mkdir()
    try:
        yield folder
        seal(folder, step=step, run_id=run_id, resumable=resumable)
        _publish(folder, target)
    except (OSError, SafetensorError) as error:
        written = sum(p.stat().st_size for p in _files(folder)) / 2**20
        free = shutil.disk_usage(target.parent).free / 2**20
        raise CheckpointError(
            f"{target.name} could not be saved: {error}. It needs more than {written:.1f} MiB in "
            f"{target.parent}, where {free:.1f} MiB are free; earlier checkpoints are untouched"
        ) from error
    finally:
        recover(target.parent)
    verify_checkpoint(target)


def rotate(output_dir: Path, *, run_id: str, limit: int | None, keep: set[Path]) -> list[Path]:
    """Delete the oldest checkpoints of this run until `limit` are left; returns what went.

    Call it only after a verified save. Never deleted: those in `keep` (the new one, the best one)
    and anything of another run or without a readable manifest, which this run didn't write.
    """
    if limit is None or limit <= 0:
        return []
    own: list[Path] = []
    for path in checkpoints(output_dir):
        try:
            if read_manifest(path)["run_id"] == run_id:
                own.append(path)
        except CheckpointError:
            continue
    kept = {p.resolve() for p in keep}
    removable = [p for p in own if p.resolve() not in kept]
    gone: list[Path] = []
    for path in removable[: max(0, len(own) - limit)]:
        try:
            remove(path)
            gone.append(path)
        except OSError as error:  # the new one is whole; this one goes with the next save
            say(f"{path.name} could not be deleted: {error}")
    return gone
