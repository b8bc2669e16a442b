from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rmipo_lite import environment
from rmipo_lite.planning import device as device_memory
from rmipo_lite.selftest.parts import tiny_trainer

GIB = 2**30


def _play(monkeypatch: pytest.MonkeyPatch, kind: str, name: str, **properties: object) -> None:
    """One card of 16 GiB, 12 of them free, of which torch's allocator has none."""
    card = torch.get_device_module(kind)
    for function, value in {
        "is_available": True, "device_count": 1, "mem_get_info": (12 * GIB, 16 * GIB),
        "memory_reserved": 0, "memory_allocated": 0, "get_device_name": name,
        "get_device_properties": SimpleNamespace(name=name, **properties),
    }.items():  # fmt: skip
        monkeypatch.setattr(card, function, lambda *_, value=value: value)
    monkeypatch.setattr(
        card.memory, "get_per_process_memory_fraction", lambda _: 1.0, raising=False
    )


@pytest.mark.parametrize("built_for", [None, "13.0"])
def test_a_card_that_this_torch_cannot_use_is_told(
    built_for: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.version, "cuda", built_for)
    monkeypatch.setattr("rmipo_lite.ops.devices.accelerator", lambda: None)
    monkeypatch.setattr("shutil.which", lambda name, **_: f"/bin/{name}")
    told = "torch was built without CUDA" if built_for is None else "finds no usable GPU"
    assert told in environment.info().precision
    for use_cpu in (False, True):
        tiny_trainer(tmp_path, use_cpu=use_cpu)
        said = "WARNING: there is an NVIDIA driver" in capsys.readouterr().out
        assert said == (built_for is None and not use_cpu)


def test_amds_card_is_named_with_rocm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4.2")
    _play(monkeypatch, "cuda", "AMD Radeon RX 6900 XT", gcnArchName="gfx1030")
    found = environment.info()
    line = "cuda:0: AMD Radeon RX 6900 XT (ROCm 6.4.2), gfx1030, 12.0 of 16.0 GiB free"
    assert found.devices[1:] == [line]
    assert found.precision == "fp16 with a gradient scaler (the GPU has no bf16 in hardware)"
    kernels = "PyTorch reference: the kernels are for CPUs and NVIDIA's GPUs alone"
    assert found.backends["cuda"] == kernels


def test_intels_card_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _play(monkeypatch, "xpu", "Intel(R) Arc(TM) A770 Graphics")
    monkeypatch.setattr(torch.xpu, "is_bf16_supported", lambda including_emulation: True)
    found = environment.info()
    assert found.devices[1:] == ["xpu:0: Intel(R) Arc(TM) A770 Graphics, 12.0 of 16.0 GiB free"]
    assert found.precision == "bf16 (the GPU has it in hardware)"
    assert found.backends["xpu"].startswith("PyTorch reference: ")


def test_intels_memory_is_asked_for_as_nvidias(monkeypatch: pytest.MonkeyPatch) -> None:
    _play(monkeypatch, "xpu", "Intel")
    card = torch.device("xpu:0")
    monkeypatch.setattr(torch.xpu, "memory_reserved", lambda _: 3 * GIB)
    monkeypatch.setattr(torch.xpu, "memory_allocated", lambda _: 2 * GIB)
    assert device_memory.free_bytes(card) == 13 * GIB
    assert device_memory.memory_in_use(card) == (3 * GIB, 16 * GIB)
    resets = []
    monkeypatch.setattr(torch.xpu, "reset_peak_memory_stats", resets.append)
    watched = device_memory.PeakMemory(card)
    monkeypatch.setattr(torch.xpu, "max_memory_allocated", lambda _: 5 * GIB)
    assert (resets, watched.growth()) == ([card], 3 * GIB)
