"""`rmipo_lite.info()`: what is installed, which device and precision a run takes, what computes.

It is what a bug report needs, so it never raises because something is missing: a package that
isn't there is a line that says so.
"""

import importlib.metadata
import os
import platform
import sys
from dataclasses import dataclass, field

from rmipo_lite.model import upstream
from rmipo_lite.output.console import gib
from rmipo_lite.version import __version__

PACKAGES = (
    "torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes", "safetensors",
    "ninja", "pybind11",
)  # fmt: skip


@dataclass(frozen=True)
class Environment:
    """The machine as a run sees it; `str()` gives the lines that `rmipo-lite info` prints.

    Attributes:
        versions: package -> version, "not installed" where missing; rmipo_lite and python too.
        devices: one line for each device.
        precision: what a run computes in by default, and why.
        backends: device type ("cpu", "cuda") -> what runs there and why.
        cache: folder of the kernels compiled at first use.
        broken: what other packages no longer have that this one leans on.
    """

    versions: dict[str, str]
    devices: list[str]
    precision: str
    backends: dict[str, str]
    cache: str
    broken: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{name:<14}{version}" for name, version in self.versions.items()]
        lines += [f"{'device':<14}{device}" for device in self.devices]
        lines.append(f"{'precision':<14}{self.precision}")
        lines += [f"{'ops on ' + kind:<14}{text}" for kind, text in self.backends.items()]
        lines.append(f"{'kernel cache':<14}{self.cache}")
        lines += [f"{'BROKEN':<14}{line}" for line in self.broken]
        return "\n".join(lines)

    __repr__ = __str__


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def versions() -> dict[str, str]:
    """Package -> version of everything a run depends on; "not installed" where missing."""
    return {"rmipo_lite": __version__, "python": sys.version.split()[0]} | {
        name: _version(name) for name in PACKAGES
    }


def _backend(device_type: str) -> str:
    from rmipo_lite.ops import library

    status = library.status(device_type)
    if not status.available:
        return f"PyTorch reference: {status.reason}"
    where = f", {status.path}" if status.path else ""
    why = f" ({status.reason})" if status.reason else ""
    return f"{status.kind or 'native'}{why}{where}"


def _cpu_line() -> str:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"cpu: {platform.machine()}, {cores} cores, {torch.get_num_threads()} threads"


def _cuda_lines() -> list[str]:
    import torch

    lines = []
    for index in range(torch.cuda.device_count()):
        props = torch.cuda.get_device_properties(index)
        free, total = map(gib, torch.cuda.mem_get_info(index))
        lines.append(
            f"cuda:{index}: {props.name}, sm_{props.major}{props.minor}, {free} of {total} GiB free"
        )
    return lines


def _precision() -> str:
    import torch

    if not torch.cuda.is_available():
        built = f"torch was built for CUDA {torch.version.cuda}" if torch.version.cuda else None
        why = f"{built}, but finds no usable GPU" if built else "a CPU build of torch"
        return f"fp32 on the CPU ({why})"
    if torch.cuda.get_device_capability()[0] >= 8:
        return "bf16 (the GPU has it in hardware)"
    return "fp16 with a gradient scaler (the GPU has no bf16 in hardware)"


def info() -> Environment:
    """Versions, devices, precision, and which implementation of the operators runs and why.

    The first call may build the extension, as the first run would.
    """
    import torch

    from rmipo_lite.ops import library

    return Environment(
        versions=versions(),
        devices=[_cpu_line(), *(_cuda_lines() if torch.cuda.is_available() else [])],
        precision=_precision(),
        backends={
            kind: _backend(kind)
            for kind in ("cpu", *(["cuda"] if torch.cuda.is_available() else []))
        },
        cache=str(library.cache_dir()),
        broken=upstream.missing(),
    )
