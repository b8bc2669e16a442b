"""What memory there is, what a process holds, and the peak over a stretch of work.

Of a card it is torch's allocator that is asked; on the CPU the process's resident set, whose peak
is the kernel's own high-water mark, reset before.
"""

import ctypes
import gc
from pathlib import Path

import psutil
import torch


def start_peak(device: torch.device) -> int | None:
    """Begin to watch the peak; bytes in use now, None where it can't be watched."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what the allocator merely keeps is not in use
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
        return _status("VmRSS")
    except (OSError, AttributeError):  # no such file here, or not ours to write
        return None


def end_peak(device: torch.device) -> int | None:
    """The most bytes in use since `start_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        return _status("VmHWM")
    except OSError:
        return None


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def memory_in_use(device: torch.device) -> tuple[int, int] | None:
    """(bytes this process holds, bytes there are): a card's reserved ones, or the resident set."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device), torch.cuda.mem_get_info(device)[1]
    try:
        return _status("VmRSS"), psutil.virtual_memory().total
    except OSError:
        return None


def free_bytes(device: torch.device) -> int:
    """Memory that a run may still take on a device."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        used = torch.cuda.memory_allocated(device)
        # What torch's allocator holds and doesn't use is free to us; a share of the card that the
        # process was limited to (set_per_process_memory_fraction) is all there is.
        share = torch.cuda.memory.get_per_process_memory_fraction(device)
        return max(0, min(free + torch.cuda.memory_reserved(device), int(share * total)) - used)
    available = int(psutil.virtual_memory().available)
    left = _left_in_container(Path("/sys/fs/cgroup"))
    return available if left is None else min(available, left)


def _left_in_container(folder: Path) -> int | None:
    """Bytes left under a container's limit (cgroup v2); None where there is no limit.

    Cached file pages count as used there, and are given up when memory is wanted.
    """
    try:
        limit = int((folder / "memory.max").read_text())
        used = int((folder / "memory.current").read_text())
        lines = (folder / "memory.stat").read_text().split("\n")
    except (OSError, ValueError):  # no such file, or "max"
        return None
    cached = next((int(line.split()[1]) for line in lines if line.startswith("file ")), 0)
    return max(0, limit - used + cached)
