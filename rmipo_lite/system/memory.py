"""Memory of this process: what it holds, its peak, a container's limit, a limit of its own."""

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

CAN_LIMIT = sys.platform == "linux"  # macOS has the call and doesn't keep to it


def held_bytes() -> int:
    """The resident set of this process."""
    return int(psutil.Process().memory_info().rss)


def reset_peak() -> bool:
    """Let the resident set's peak begin anew; whether this system can (Linux)."""
    if sys.platform != "linux":
        return False
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what the allocator merely keeps is not in use
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except (OSError, AttributeError):  # no such file here, or not ours to write
        return False
    return True


def lifetime_peak() -> int | None:
    """The largest resident set since the process began, or `reset_peak`; None where unknown."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    if sys.platform == "linux":
        return _status("VmHWM")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts bytes


def _status(name: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), None)


def left_in_container(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes left under a container's limit (cgroup v2); None where there is no limit.

    Cached file pages count as used there, and are given up when memory is wanted.
    """
    try:
        limit = int((folder / "memory.max").read_text(encoding="ascii"))
        used = int((folder / "memory.current").read_text(encoding="ascii"))
        lines = (folder / "memory.stat").read_text(encoding="ascii").split("\n")
    except (OSError, ValueError):  # no such file, or "max"
        return None
    cached = next((int(line.split()[1]) for line in lines if line.startswith("file ")), 0)
    return max(0, limit - used + cached)


@contextlib.contextmanager
def limit(size: int) -> Iterator[None]:
    """Let allocations beyond `size` bytes fail, those of other threads too; on Linux alone."""
    if sys.platform != "linux":
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = psutil.Process().memory_info().vms + size
    known = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([wanted, *known]), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
