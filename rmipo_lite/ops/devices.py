"""Kinds of device: which one a run takes, and what of arithmetic it has in hardware."""

import platform
import shutil
from types import ModuleType

import torch
from torch import Tensor

# AMD's architectures with bfloat16 products: CDNA, and RDNA 3 and newer.
_BF16_ON_AMD = ("gfx908", "gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")


def gpus() -> dict[str, ModuleType]:
    """torch's module of every kind of GPU that is here, in transformers' order of choice."""
    known = {"mps": torch.mps, "xpu": torch.xpu, "cuda": torch.cuda}
    return {kind: module for kind, module in known.items() if module.is_available()}


def accelerator() -> str | None:
    """The kind of GPU that a run takes, as transformers' Trainer chooses; None: the CPU."""
    return next(iter(gpus()), None)


def is_nvidia(kind: str) -> bool:
    """Whether a kind of device is NVIDIA's; AMD's has the same name in torch."""
    return kind == "cuda" and not torch.version.hip


def is_trusted(kind: str) -> bool:
    """Whether torch's products and fused attention are right there, whatever they read and write.

    Those of Apple's GPUs are not: up to torch 2.13 a product into a slice can be lost, on older
    chips a sum over 32,767 numbers and more runs past the end, and attention of a few queries was
    wrong with masks and strides. Of Intel's it isn't known. "meta" has none to be wrong.
    """
    return kind in ("cpu", "cuda", "meta")


def unused_gpu() -> str | None:
    """Where an NVIDIA driver is here and this torch is a CPU build, as pip's is on Windows: why."""
    if accelerator() or torch.version.cuda or torch.version.hip or not shutil.which("nvidia-smi"):
        return None
    return (
        "there is an NVIDIA driver, but this torch was built without CUDA, so the CPU does the "
        "work; install torch from PyTorch's own CUDA index"
    )


def has_native_bf16(kind: str) -> bool:
    """Whether a kind of GPU, as it is here, has bfloat16 products in hardware.

    Of Apple's, which emulate it up to M2, none counts: what bf16 costs there isn't measured.
    """
    if kind == "xpu":
        return torch.xpu.is_bf16_supported(including_emulation=False)
    if kind != "cuda":
        return False
    if torch.version.hip:  # where a capability is no NVIDIA's, and torch counts emulation
        return torch.cuda.get_device_properties().gcnArchName.startswith(_BF16_ON_AMD)
    # torch.cuda.is_bf16_supported() counts emulation (Turing) too, which is slower than fp16.
    return torch.cuda.get_device_capability()[0] >= 8


def x86_has_bf16() -> bool:
    """Whether an x86 CPU has bfloat16 products in hardware."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def slow_bf16() -> str | None:
    """Why bfloat16 is slow on this CPU; None where it isn't, or nobody knows."""
    if platform.machine().lower() not in ("x86_64", "amd64") or x86_has_bf16():
        return None
    # A step of one pair on Gemma 3 270M took 77 s on an AVX2 machine, and 2 s in float32.
    return "this CPU has no bfloat16 products: bf16=True takes many times as long as float32 here"


def has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64; Apple's GPUs don't, nor do some of Intel's."""
    if device.type == "xpu":
        return bool(torch.xpu.get_device_properties(device).has_fp64)
    return device.type != "mps"


def in_float64(x: Tensor) -> Tensor:
    """The same numbers in float64: on their device, or on the CPU where it has none."""
    return (x if has_float64(x.device) else x.cpu()).double()


def no_kernels(kind: str) -> str | None:
    """Why no kernels were written for a kind of device; None where they were."""
    if kind == "cpu" or is_nvidia(kind):
        return None
    return "the kernels are for CPUs and NVIDIA's GPUs alone"
