"""temporary"""

from __future__ import annotations
from typing import NamedTuple
import torch


class BackendStatus(NamedTuple):
    available: bool
    kind: str | None
    path: str | None
    reason: str


def status(device_type: str) -> BackendStatus:
    return BackendStatus(False, None, None, "not built yet")


_flags: dict[torch.device, torch.Tensor] = {}


def device_flag(device: torch.device) -> torch.Tensor:
    if device not in _flags:
        _flags[device] = torch.zeros((), dtype=torch.bool, device=device)
    return _flags[device]


def check_impl(op: str, impl: str) -> None:
    if impl not in ("auto", "native", "torch"):
        raise ValueError(f"{op}: impl must be auto, native or torch, got {impl!r}")


def use_native(impl: str, device: torch.device) -> bool:
    return False


def row_logps(*a):
    raise NotImplementedError


def pair_losses(*a):
    raise NotImplementedError
