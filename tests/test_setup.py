"""Packaging of the kernels: names of the libraries, and what is in the way of an install."""

from __future__ import annotations

import os
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import setuptools
from setuptools import Distribution
from setuptools.command.build_ext import build_ext

from tests.conftest import ROOT


@pytest.fixture
def builder(monkeypatch, tmp_path: Path) -> Callable[[str], Any]:
    """setup.py's build of extensions on a system, in a folder of its own."""

    def make(platform: str) -> Any:
        for name in ("CUDA_HOME", "TORCH_CUDA_ARCH_LIST", "DISTUTILS_USE_SDK"):
            monkeypatch.setenv(name, "")  # what setup.py sets ends with the test
            monkeypatch.delenv(name)
        monkeypatch.setattr(setuptools, "setup", lambda **_: None)
        monkeypatch.chdir(ROOT)
        names = runpy.run_path(str(ROOT / "setup.py"))
        monkeypatch.setattr(names["build"], "PLATFORM", platform)
        monkeypatch.setitem(names["BuildPy"].run.__globals__, "PACKAGE", tmp_path / "source")
        command = names["kernel_builder"]()(Distribution({"ext_modules": names["native"]}))
        command.ensure_finalized()
        command.build_lib = str(tmp_path)
        return command

    return make


@pytest.mark.parametrize(
    ("platform", "name"),
    [
        ("linux", "_native_cpu.abi3.so"),
        ("darwin", "_native_cpu.abi3.so"),
        ("win32", "_native_cpu.pyd"),
    ],
)
def test_the_extension_is_where_the_package_looks(
    platform: str, name: str, builder: Callable[[str], Any]
) -> None:
    command = builder(platform)
    assert command.get_ext_filename("rmipo_lite._native_cpu") == os.path.join("rmipo_lite", name)
    cpu = command.extensions[-1]
    assert cpu.name == "rmipo_lite._native_cpu"
    assert sorted(cpu.sources) == ["csrc/cpu/blocks.cpp", "csrc/cpu/pairs.cpp", "csrc/cpu/rows.cpp"]


def test_visual_studios_prompt_is_taken_as_it_is(
    builder: Callable[[str], Any], monkeypatch
) -> None:
    """Without the variable torch's build refuses to run there."""
    monkeypatch.delenv("VSCMD_ARG_TGT_ARCH", raising=False)
    builder("linux")
    assert "DISTUTILS_USE_SDK" not in os.environ
    monkeypatch.setenv("VSCMD_ARG_TGT_ARCH", "x64")
    builder("win32")
    assert os.environ["DISTUTILS_USE_SDK"] == "1"


def test_a_library_in_use_does_not_fail_the_install(
    builder: Callable[[str], Any], monkeypatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Windows neither removes nor replaces it; it gets no record of the new sources."""
    command = builder("win32")
    command.extensions = command.extensions[-1:]
    library = tmp_path / "rmipo_lite" / "_native_cpu.pyd"
    library.parent.mkdir()
    library.write_bytes(b"in use")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("Access is denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        command.build_extensions()
    assert not library.with_suffix(".sha256").exists()
    monkeypatch.setattr(build_ext, "copy_extensions_to_source", refuse)
    command.copy_extensions_to_source()
    assert capsys.readouterr().err == (
        "rmipo_lite: no rmipo_lite._native_cpu: Access is denied\n"
        "rmipo_lite: what is in use stays as it is: Access is denied\n"
    )
