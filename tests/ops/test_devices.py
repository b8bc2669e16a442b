from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from rmipo_lite.ops import devices


@pytest.mark.parametrize(
    ("here", "taken"),
    [
        ((), None),
        (("cuda",), "cuda"),
        (("cuda", "xpu"), "xpu"),
        (("cuda", "xpu", "mps"), "mps"),
    ],
)
def test_the_device_is_the_one_that_transformers_takes(
    here: tuple[str, ...], taken: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("cuda", "xpu", "mps"):
        module = torch.get_device_module(kind)
        monkeypatch.setattr(module, "is_available", lambda kind=kind: kind in here)
    assert devices.accelerator() == taken


@pytest.mark.parametrize(
    ("architecture", "has"),
    [
        ("gfx906:sramecc+:xnack-", False),
        ("gfx90a:sramecc+:xnack-", True),
        ("gfx942:sramecc+:xnack-", True),
        ("gfx1030", False),  # whose capability is 10.3
        ("gfx1100", True),
        ("gfx1201", True),
    ],
)
def test_bf16_on_amd(architecture: str, has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.1")
    card = SimpleNamespace(gcnArchName=architecture)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: card)
    assert devices.has_native_bf16("cuda") is has


def test_kernels_are_for_cpus_and_nvidia(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    assert [devices.no_kernels(kind) is None for kind in ("cpu", "cuda", "mps", "xpu")] == [
        True, True, False, False,
    ]  # fmt: skip
    monkeypatch.setattr(torch.version, "hip", "7.1")
    assert devices.no_kernels("cpu") is None
    assert devices.no_kernels("cuda") == "the kernels are for CPUs and NVIDIA's GPUs alone"


@pytest.mark.parametrize("has", [False, True])
def test_some_of_intels_have_no_float64(has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(has_fp64=has)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: card)
    assert devices.has_float64(torch.device("xpu")) is has
    assert devices.has_float64(torch.device("cpu"))
    assert not devices.has_float64(torch.device("mps"))


@pytest.mark.parametrize(
    ("machine", "has", "slow"),
    [
        ("x86_64", False, True),
        ("AMD64", False, True),
        ("x86_64", True, False),
        ("arm64", False, False),
    ],
)
def test_where_bfloat16_is_slow(
    machine: str, has: bool, slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(devices, "x86_has_bf16", lambda: has)
    assert (devices.slow_bf16() is not None) == slow
