"""What memory there is, what a process holds, and the peak over a stretch of work.

Of a card it is torch's allocator that is asked; on the CPU the process's resident set. Apple's GPUs
share the machine's memory, of which the system recommends them a part.
"""

import gc
from typing import Any

import psutil
import torch

from rmipo_lite.system import memory

_CARDS = ("cuda", "xpu")  # whose modules of torch have the same functions


class PeakMemory:
    """Watches the memory in use from its making on.

    Attributes:
        before: bytes in use at the start.
    """

    def __init__(self, device: torch.device) -> None:
        gc.collect()
        self._device, self._known = device, 0
        if device.type in _CARDS:
            card = _module(device)
            card.reset_peak_memory_stats(device)
            self.before = card.memory_allocated(device)
            return
        if device.type == "mps":
            # There is no peak to ask for: the pool's size is one, since it shrinks only here.
            torch.mps.empty_cache()
            self.before = torch.mps.driver_allocated_memory()
            return
        if not memory.reset_peak():
            # The peak of the process's life: a stretch that stays below it has none to tell.
            self._known = memory.lifetime_peak() or 0
        self.before = memory.held_bytes()

    def growth(self) -> int | None:
        """The most bytes in use beyond what was at the start; None where it can't be told."""
        if self._device.type in _CARDS:
            return int(_module(self._device).max_memory_allocated(self._device) - self.before)
        if self._device.type == "mps":
            return torch.mps.driver_allocated_memory() - self.before
        peak = memory.lifetime_peak()
        return peak - self.before if peak is not None and peak > self._known else None


def memory_in_use(device: torch.device) -> tuple[int, int]:
    """(bytes this process holds, bytes there are): a card's reserved ones, or the resident set."""
    if device.type in _CARDS:
        return _module(device).memory_reserved(device), total_bytes(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory(), total_bytes(device)
    return memory.held_bytes(), psutil.virtual_memory().total


def peak_bytes(device: torch.device) -> int:
    """The most that was in use of a card, or the largest resident set, so far."""
    if device.type in _CARDS:
        return int(_module(device).max_memory_allocated(device))
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return memory.lifetime_peak() or memory.held_bytes()


def name_of(device: torch.device) -> str:
    """What a GPU is called by its maker."""
    if device.type == "mps":
        return torch.backends.mps.get_name()
    return str(_module(device).get_device_name(device))


def total_bytes(device: torch.device) -> int:
    """The memory of a GPU; of an Apple one, what the system recommends it to take at most."""
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory())
    return int(_module(device).mem_get_info(device)[1])


def free_bytes(device: torch.device) -> int:
    """Memory that a run may still take on a device."""
    if device.type in _CARDS:
        free, total = _module(device).mem_get_info(device)
        used = _module(device).memory_allocated(device)
        # What torch's allocator holds and doesn't use is free to us; a share of the card that the
        # process was limited to (set_per_process_memory_fraction) is all there is.
        reserved = _module(device).memory_reserved(device)
        return max(0, min(free + reserved, int(_share(device) * total)) - used)
    available = int(psutil.virtual_memory().available)
    if device.type == "mps":
        # What torch's pool holds is available no more, and what of it is unused is free to us.
        pool = torch.mps.driver_allocated_memory()
        room = min(available, total_bytes(device) - pool)
        return max(0, room + pool - torch.mps.current_allocated_memory())
    left = memory.left_in_container()
    return available if left is None else min(available, left)


def _module(device: torch.device) -> Any:
    return torch.get_device_module(device)


def _share(device: torch.device) -> float:
    """Of a card's memory, what this process was limited to."""
    limit = getattr(_module(device).memory, "get_per_process_memory_fraction", None)
    return 1.0 if limit is None else float(limit(device))
