"""The peak of memory over a stretch of work: of a card's allocator, or of the resident set.

On the CPU it is the kernel's own high-water mark, reset before.
"""

from __future__ import annotations

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
