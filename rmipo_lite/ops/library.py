"""Finding, building and loading the libraries of C++ and CUDA kernels.

A device type's library is looked for in this order: prebuilt beside the package (setup.py), in the
cache, and else it is compiled into the cache (seconds on the CPU). Whatever is in the way, the
PyTorch reference does the work and one line says what is missing: `status` has it.

The cache is `$RMIPO_LITE_CACHE`, else `~/.cache/rmipo_lite`, keyed by sources, torch, CUDA and
architecture. A build happens in a private folder, is loaded there, and is renamed into place with
its hash beside it, under a file lock that the system drops when its holder dies: a half-written
file is never loaded, no lock outlives a killed build, and what such a build leaves behind is
removed by the next one. A library counts as ours when its kernels are registered, not because it
loads. Windows lets a loaded library be renamed, but neither replaced nor removed: where such a one
is in the place, what was built serves this process from its private folder.
"""

import contextlib
import hashlib
import os
import platform
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import filelock
import torch

from rmipo_lite.ops import build
from rmipo_lite.ops.devices import no_kernels
from rmipo_lite.system import files

_LOCK_LIMIT_S = 300.0  # longer than any build; then the reference does the work


_SILENCE_S = 2.0  # who waits longer than this for another process's build says so


_PACKAGE = Path(__file__).resolve().parent.parent


_KERNELS = {
    "cpu": ("row_logps", "fold_logits", "pair_losses"),
    "cuda": ("row_logps", "row_exponentials", "pair_losses"),
}


class BackendStatus(NamedTuple):
    """Whether a device type's kernels are in use, where from, and if not, why."""

    available: bool
    kind: Literal["prebuilt", "cached", "built"] | None
    path: str | None
    reason: str | None  # one line that names what is missing; None where available


_lock = threading.Lock()


_statuses: dict[str, BackendStatus] = {}


_process = os.getpid()


def notice_fork() -> None:
    """In a forked child: work in one thread, and don't wait for a thread that held the lock.

    The parent's thread pool and its other threads don't exist there.
    """
    global _process, _lock
    if os.getpid() != _process:
        _process, _lock = os.getpid(), threading.Lock()
        torch.set_num_threads(1)


def status(device_type: str) -> BackendStatus:
    """Load a device type's kernels, building them if need be, and say how that went."""
    notice_fork()
    with _lock:
        if device_type not in _statuses:
            _statuses[device_type] = _load(device_type)
        return _statuses[device_type]


def cache_dir() -> Path:
    """Where libraries compiled at first use are kept."""
    return Path(os.environ.get("RMIPO_LITE_CACHE") or Path.home() / ".cache" / "rmipo_lite")


def _load(device_type: str) -> BackendStatus:
    try:
        absent = no_kernels(device_type)
        if absent:
            raise build.BuildError(absent)
        if device_type == "cuda" and not torch.cuda.is_available():
            raise build.BuildError("torch sees no CUDA device")
        prebuilt = _PACKAGE / build.library_name(device_type)
        if _matches(prebuilt, build.source_hash()) and _opens(prebuilt, device_type):
            return BackendStatus(True, "prebuilt", str(prebuilt), None)
        return _load_cached(device_type)
    except (build.BuildError, OSError, RuntimeError) as error:
        text = str(error).splitlines()
        return BackendStatus(False, None, None, text[0] if text else type(error).__name__)


def cached_library(device_type: str) -> Path:
    """Where the cache keeps a device type's library of these sources, for this torch.

    Raises:
        BuildError: the sources are absent.
    """
    parts = (
        device_type, build.source_hash(), torch.__version__, str(torch.version.cuda),
        platform.machine(), _architectures(device_type),
    )  # fmt: skip
    key = hashlib.sha256("|".join(parts).encode()).hexdigest()[:24]
    return cache_dir() / key / build.library_name(device_type)


def _architectures(device_type: str) -> str:
    """What to compile for: the card that is here, and PTX for what comes after it."""
    if device_type != "cuda":
        return ""
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}+PTX"


def _load_cached(device_type: str) -> BackendStatus:
    target = cached_library(device_type)
    cache, key = target.parent.parent, target.parent.name
    if _matches(target) and _opens(target, device_type):
        return BackendStatus(True, "cached", str(target), None)
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _file_lock(cache / f"{key}.lock"):
        if _matches(target) and _opens(target, device_type):  # another process built it meanwhile
            return BackendStatus(True, "cached", str(target), None)
        build.require_tools(device_type)
        _tell(f"compiling the {device_type} kernels, once")
        for leftover in cache.glob(f"build-{key}-*"):  # of a killed build: the lock is ours
            shutil.rmtree(leftover, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(dir=cache, prefix=f"build-{key}-"))
        try:
            built = build.build(device_type, folder, _architectures(device_type))
            # From here, not from its place: the loader takes a path it has met for the library it
            # loaded from it, whatever has been put there since.
            _open(built, device_type)
            target = _publish(built, target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return BackendStatus(True, "built", str(target), None)


def _publish(built: Path, target: Path) -> Path:
    """Rename a library into its place, its record after it; return where it is then.

    On Windows that is where it was if another library is loaded from its place.
    """
    target.parent.mkdir(exist_ok=True)
    build.write_record(built, build.source_hash())
    try:
        files.move(built, target)
    except PermissionError:
        if build.PLATFORM != "win32":
            raise
        with contextlib.suppress(OSError):  # or the next process would load what is there again
            target.with_suffix(".sha256").unlink()
        _tell(f"{target} is in use by a program, so the next one compiles again")
        return built
    files.move(built.with_suffix(".sha256"), target.with_suffix(".sha256"))
    return target


def _tell(text: str) -> None:
    """One line for whoever waits; a closed standard error costs the line and nothing else."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(f"rmipo_lite: {text}\n")
        sys.stderr.flush()


def _matches(library: Path, sources: str | None = None) -> bool:
    """Whether a library is whole, by the hash beside it, and of these sources where given."""
    try:
        record = library.with_suffix(".sha256").read_text("utf-8", "replace").split()
        want = record[:1] == [build.file_hash(library)]
        return want and (sources is None or record[1:] == [sources])
    except OSError:
        return False


def _opens(library: Path, device_type: str) -> bool:
    """Load a library; False where it is of another system or another torch, or isn't ours."""
    try:
        _open(library, device_type)
    except build.BuildError:
        return False
    return True


def _open(library: Path, device_type: str) -> None:
    """Load a library.

    Raises:
        BuildError: it was made for another system or another torch, or doesn't bring the kernels.
    """
    try:
        torch.ops.load_library(str(library))
    except OSError as error:  # the loader's own words are one level down
        raise build.BuildError(f"the library does not load: {error.__cause__ or error}") from error
    for name in _KERNELS[device_type]:
        op = f"rmipo_lite::{name}"
        if not torch._C._dispatch_has_kernel_for_dispatch_key(op, device_type.upper()):
            raise build.BuildError(f"{library} loads but has no kernel {name} for {device_type}")


@contextlib.contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    """Hold a lock that the system releases when the process dies.

    Raises:
        BuildError: another process has held it too long, or the filesystem has no such locks.
    """
    # The soft fallback would be a file whose mere existence locks: it outlives a killed holder.
    lock = filelock.FileLock(path, poll_interval=0.1, fallback_to_soft=False)
    try:
        try:
            lock.acquire(timeout=_SILENCE_S)
        except filelock.Timeout:
            _tell("waiting for another process that compiles the kernels")
            lock.acquire(timeout=_LOCK_LIMIT_S)
    except filelock.Timeout:
        limit = f"{_LOCK_LIMIT_S:.0f} s"
        raise build.BuildError(f"another process has held {path} for {limit}") from None
    except OSError as error:
        raise build.BuildError(f"{path} can't be locked: {error}") from error
    try:
        yield
    finally:
        lock.release()
