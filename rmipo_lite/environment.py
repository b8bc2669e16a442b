"""`rmipo_lite.info()`: what is installed, which device and precision a run takes, what computes.

It is what a bug report needs, so it never raises because something is missing: a package that
isn't there is a line that says so.
"""

import importlib.metadata
import platform
import sys
from dataclasses import dataclass, field
from typing import Any

from rmipo_lite.model import upstream
from rmipo_lite.output.console import gib
from rmipo_lite.system.processes import cores
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
        backends: device type ("cpu", "cuda", "mps", "xpu") -> what runs there and why.
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

    return f"cpu: {platform.machine()}, {cores()} cores, {torch.get_num_threads()} threads"


def _gpu_lines(kind: str) -> list[str]:
    import torch

    from rmipo_lite.planning.device import free_bytes, name_of, total_bytes

    devices = [torch.device(kind, i) for i in range(torch.get_device_module(kind).device_count())]
    return [
        f"{device}: {name_of(device)}{_details(device)}, {gib(free_bytes(device))} of "
        f"{gib(total_bytes(device))} GiB free"
        for device in devices
    ]


def _details(device: Any) -> str:
    """What else there is to say of a GPU that CUDA or ROCm drives."""
    import torch

    if device.type != "cuda":
        return ""
    props = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return f" (ROCm {torch.version.hip}), {props.gcnArchName}"
    return f", sm_{props.major}{props.minor}"


def _precision() -> str:
    import torch

    from rmipo_lite.ops.devices import accelerator, has_native_bf16, unused_gpu

    kind = accelerator()
    if kind is None:
        why = unused_gpu() or "a CPU build of torch"
        if torch.version.cuda:
            why = f"torch was built for CUDA {torch.version.cuda}, but finds no usable GPU"
        return f"fp32 on the CPU ({why})"
    if has_native_bf16(kind):
        return "bf16 (the GPU has it in hardware)"
    if kind == "cuda":
        return "fp16 with a gradient scaler (the GPU has no bf16 in hardware)"
    return f"fp32 on {kind} (bf16=True halves the weights)"


def info() -> Environment:
    """Versions, devices, precision, and which implementation of the operators runs and why.

    The first call may build the extension, as the first run would.
    """
    from rmipo_lite.ops import library
    from rmipo_lite.ops.devices import accelerator

    kind = accelerator()
    return Environment(
        versions=versions(),
        devices=[_cpu_line(), *(_gpu_lines(kind) if kind else [])],
        precision=_precision(),
        backends={name: _backend(name) for name in ("cpu", kind) if name},
        cache=str(library.cache_dir()),
        broken=[] if upstream.is_known() else upstream.missing(),
    )
