"""An Apple GPU played on the CPU: what isn't there raises, and numbers are real.

Tensors are the CPU's own, so autograd, views and `.tolist()` work as ever; which of them are "on
the GPU" is known by their memory. Every operator goes through `_Operators`, in backward passes too.
It refuses what torch's MPS backend refuses (float64, pinned memory, operands of two devices), and a
copy that doesn't wait, which there reads its source after it may have been freed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import training_args

from rmipo_lite.ops import native

MPS = torch.device("mps:0")
CPU = torch.device("cpu")
GIB = 2**30
_device_of = torch._C.TensorBase.device.__get__
# A copy from one device to the other is theirs, and an index may be on the CPU.
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm")
_BETWEEN_DEVICES = ("aten::copy_", "aten::_to_copy", "aten::index")


class SimulatedMps:
    """Which memory is the GPU's; the weak references keep an address from being used again."""

    def __init__(self) -> None:
        self._blocks: dict[int, StorageWeakRef] = {}

    def has(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._blocks

    def take(self, tensor: Tensor) -> Tensor:
        if tensor.dtype in (torch.float64, torch.complex128):
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support "
                "float64. Please use float32 instead."
            )
        storage = tensor.untyped_storage()
        self._blocks.setdefault(storage._cdata, StorageWeakRef(storage))
        return tensor


class _Operators(TorchDispatchMode):
    """Every operator, in a backward pass too."""

    def __init__(self, gpu: SimulatedMps) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), func._schema.name
        inputs = _tensors((*args, *kwargs.values()))
        is_here = [self._gpu.has(tensor) for tensor in inputs]
        mixed = any(t.dim() and not here for t, here in zip(inputs, is_here, strict=True))
        # What torch's own backward formulas make anew is on the device of what C++ holds it for.
        in_backward = torch._C._current_graph_task_id() != -1
        if any(is_here) and mixed and name not in _BETWEEN_DEVICES and not in_backward:
            raise RuntimeError(f"{name}: expected all tensors to be on the same device")
        if any(is_here) and name in _PRODUCTS:
            _refuse_faulty_product(_tensors(args), name == "aten::addmm_", kwargs.get("out"))
        own = torch._library.custom_ops.OPDEFS.get(name)
        if own is not None:  # its body is Python, whose calls and operators are to be seen too
            with self, torch._C._EnableTorchFunction(), _Calls(self._gpu):
                return own._init_fn(*args, **kwargs)
        named = kwargs.get("device")
        goes = named is not None and torch.device(named).type == "mps"
        out = func(*args, **(kwargs | {"device": CPU} if goes else kwargs))
        if goes or (any(is_here) and name != "aten::copy_"):
            for tensor in _tensors(out if isinstance(out, tuple | list) else (out,)):
                self._gpu.take(tensor)
        return out


def _refuse_faulty_product(args: list[Tensor], in_place: bool, out: Tensor | None) -> None:
    """What torch up to 2.13 gets wrong on some chips or systems, without a word."""
    if args[-1].shape[-2] > 32766:
        raise RuntimeError("a product that sums over so many numbers runs past its end")
    out = args[0] if in_place else out
    if out is not None and (out.storage_offset() or not out.is_contiguous()):
        raise RuntimeError("a product into a slice is lost")


def _tensors(values: Any) -> list[Tensor]:
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += [part for part in value if isinstance(part, Tensor)]
    return found


class _Calls(TorchFunctionMode):
    """Devices are named in calls: what asks for the GPU is done on the CPU, and becomes its."""

    def __init__(self, gpu: SimulatedMps) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in ("__get__", "__set__", "_parse_to", "device"):
            return func(*args, **kwargs)
        if func is Tensor.backward:  # what it calls is to be seen too
            options = {"grad_tensors" if n == "gradient" else n: v for n, v in kwargs.items()}
            with self:
                return torch.autograd.backward(*args, **options)
        if func is Tensor.to and len(args) > 1 and isinstance(args[1], Tensor):  # as another is
            args = (args[0].to(args[1].dtype), args[1].device, *args[2:])
        source = args[0] if args and isinstance(args[0], Tensor) else None
        is_here = source is not None and self._gpu.has(source)
        if func in (Tensor.numpy, Tensor.pin_memory) and is_here:
            raise TypeError("can't convert mps:0 device type tensor to numpy or pinned memory")
        named = [CPU] if func is Tensor.cpu else [*map(_device, (*args, *kwargs.values()))]
        named = [device for device in named if device is not None]
        if not named:
            return func(*args, **kwargs)
        goes = named[-1].type == "mps"
        if goes:
            args = [CPU if _device(value) else value for value in args]
            kwargs = {name: CPU if _device(value) else value for name, value in kwargs.items()}
        is_move = func in (Tensor.to, Tensor.cpu) and source is not None
        if is_move and is_here != goes:
            # Neither a positional nor a named flag: on this GPU the source may be gone by then.
            if kwargs.get("non_blocking") or (func is Tensor.to and True in args[1:]):
                raise RuntimeError("a copy to or from the GPU has to wait")
            args = [_Move.apply(source, self._gpu, goes), *args[1:]]
        out = func(*args, **kwargs)
        if goes:
            for tensor in _tensors((out,)):
                self._gpu.take(tensor)
        return out


def _device(value: Any) -> torch.device | None:
    if isinstance(value, str):
        return torch.device(value) if value.split(":")[0] in ("cpu", "mps") else None
    return value if isinstance(value, torch.device) else None


class _Move(torch.autograd.Function):
    """A copy to the other device, and of its gradient back."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, gpu: SimulatedMps, goes: bool) -> Tensor:
        ctx.gpu, ctx.goes = gpu, goes
        return _copied(source, gpu, goes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _copied(grad, ctx.gpu, not ctx.goes), None, None


def _copied(source: Tensor, gpu: SimulatedMps, goes: bool) -> Tensor:
    with _disable_current_modes():
        copy = source.detach().clone()
    return gpu.take(copy) if goes else copy


def _by_device(lists: list[list[Any]], with_indices: bool = False) -> dict[Any, Any]:
    """torch's own grouping, which asks the memory in C++, by what a tensor says of itself."""
    groups: dict[Any, Any] = {}
    for index, first in enumerate(lists[0]):
        parts, indices = groups.setdefault((first.device, first.dtype), ([[] for _ in lists], []))
        for part, one in zip(parts, lists, strict=True):
            part += [one[index]] if one else []
        indices += [index] if with_indices else []
    return groups


def play_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the test ends this is a Mac of 16 GiB, of which its GPU is recommended 10."""
    found = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "empty_cache": lambda: None,
        "synchronize": lambda: None,
        "recommended_max_memory": lambda: 10 * GIB,
        "driver_allocated_memory": lambda: 3 * GIB,
        "current_allocated_memory": lambda: 2 * GIB,
        "get_rng_state": lambda index: torch.zeros(1, dtype=torch.uint8),
        "set_rng_state": lambda state, index: None,
    }
    for name, value in found.items():
        monkeypatch.setattr(torch.mps, name, value)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "get_name", lambda: "Apple M2 Pro")
    # transformers asks once a process.
    monkeypatch.setattr(training_args, "is_torch_mps_available", lambda *_: True)
    monkeypatch.setattr(training_args, "is_torch_bf16_gpu_available", lambda: True)


@contextmanager
def simulated_mps(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatedMps]:
    """Inside the block tensors are on such a GPU where they are asked to be."""
    gpu = SimulatedMps()
    monkeypatch.setattr(native, "_flags", {})
    monkeypatch.setattr(torch._C, "_group_tensors_by_device_and_dtype", _by_device)
    where = property(lambda tensor: MPS if gpu.has(tensor) else _device_of(tensor))
    monkeypatch.setattr(Tensor, "device", where, raising=False)
    engine = torch.autograd._engine_run_backward

    def run_backward(*args: Any, **kwargs: Any) -> Any:
        with _Calls(gpu):  # what hooks call in there, such as a block's recomputing
            return engine(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "_engine_run_backward", run_backward)
    with _Operators(gpu), _Calls(gpu):
        yield gpu
