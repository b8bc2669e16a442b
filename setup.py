"""Packaging of the C++/CUDA part; everything else stands in pyproject.toml.

With torch visible (`pip install --no-build-isolation -e .`) the kernels are compiled now. Without
it (a plain `pip install -e .` builds in isolation) the sources travel with the package and are
compiled at first use. Either way a failing compiler never fails the install: plain PyTorch does
the work then, and `rmipo-lite info` says what is missing.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def load_build_module():
    """rmipo_lite/ops/build.py by path: importing the package would need torch."""
    path = ROOT / "rmipo_lite" / "ops" / "build.py"
    spec = importlib.util.spec_from_file_location("rmipo_lite_build", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compile_kernels(target: Path) -> None:
    """Libraries for the CPU and, where torch has CUDA and there is a toolkit, for CUDA."""
    try:
        import torch
    except ImportError:
        sys.stderr.write("rmipo_lite: torch isn't visible, so the kernels compile at first use\n")
        return
    build = load_build_module()
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(".", "").replace("+PTX", "")
    architectures = tuple(wanted.replace(";", " ").split()) or build.CUDA_ARCHITECTURES
    for device_type in ["cpu"] + (["cuda"] if torch.version.cuda else []):
        try:
            with tempfile.TemporaryDirectory() as folder:
                library = build.build(device_type, Path(folder), architectures)
                record = library.with_suffix(".sha256")
                digest = build.hashlib.sha256(library.read_bytes()).hexdigest()
                record.write_text(f"{digest} {build.source_hash()}\n")
                shutil.copy(library, target)
                shutil.copy(record, target)
        except (build.BuildError, OSError) as error:
            sys.stderr.write(f"rmipo_lite: no {device_type} kernels: {error}\n")


class BuildPy(build_py):
    """Adds the kernels, and in a wheel their sources."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            compile_kernels(ROOT / "rmipo_lite")
            return
        package = Path(self.build_lib) / "rmipo_lite"
        shutil.copytree(ROOT / "csrc", package / "csrc", dirs_exist_ok=True)
        compile_kernels(package)


def bindings() -> list:
    """The torch-free bindings, where pybind11 is there; optional, like the kernels."""
    try:
        from pybind11.setup_helpers import Pybind11Extension
    except ImportError:
        return []
    extension = Pybind11Extension("rmipo_lite._bindings", ["csrc/bindings.cpp"], cxx_std=20)
    extension.optional = True
    return [extension]


setup(
    packages=find_packages(include=["rmipo_lite", "rmipo_lite.*"]),
    ext_modules=bindings(),
    cmdclass={"build_py": BuildPy},
)
