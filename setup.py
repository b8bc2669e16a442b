"""Packaging of the C++/CUDA part; everything else stands in pyproject.toml.

With torch visible (`pip install --no-build-isolation -e .`) torch's BuildExtension compiles the
kernels now. Without it (a plain `pip install -e .` builds in isolation) the sources travel with
the package and are compiled at first use. Either way a failing compiler never fails the install:
plain PyTorch does the work then, and `rmipo-lite info` says what is missing.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PACKAGE = ROOT / "rmipo_lite"


def load_build_module():
    """rmipo_lite/ops/build.py by path: importing the package would need torch."""
    spec = importlib.util.spec_from_file_location("rmipo_lite_build", PACKAGE / "ops" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = load_build_module()


def say(text: str) -> None:
    sys.stderr.write(f"rmipo_lite: {text}\n")


def bindings() -> list:
    """The torch-free bindings, where pybind11 is there; optional, like the kernels."""
    try:
        from pybind11.setup_helpers import Pybind11Extension
    except ImportError:
        return []
    extension = Pybind11Extension("rmipo_lite._bindings", ["csrc/bindings.cpp"], cxx_std=20)
    extension.optional = True
    return [extension]


def kernel(device_type: str):
    """The extension of one device type; raises BuildError where a part is missing."""
    arguments = {
        "name": f"rmipo_lite.{build.extension_name(device_type)}",
        "sources": [path.relative_to(ROOT).as_posix() for path in build.source_files(device_type)],
        "extra_compile_args": build.compile_flags(device_type),
        "py_limited_api": True,  # names the file for every Python; it calls none of them
        "optional": True,
    }
    if device_type == "cpu":
        from torch.utils.cpp_extension import CppExtension

        return CppExtension(**arguments)
    toolkit = build.cuda_home()
    archive, *libraries = build.static_cuda_runtime(toolkit)
    os.environ["CUDA_HOME"] = str(toolkit)  # torch's own guess fails where nvcc is a wrapper
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", build.CUDA_ARCHITECTURES)
    from torch.utils.cpp_extension import CUDAExtension

    arguments.update(extra_objects=[archive], extra_link_args=libraries)
    extension = CUDAExtension(**arguments)
    extension.libraries.remove("cudart")
    return extension


def kernels() -> list:
    """Extensions of the CPU and, where torch has CUDA and there is a toolkit, of CUDA."""
    try:
        import torch
    except (ImportError, OSError):
        say("torch isn't visible, so the kernels compile at first use")
        return []
    found = []
    # CUDA first: torch reads CUDA_HOME once
    for device_type in (["cuda"] if torch.version.cuda else []) + ["cpu"]:
        try:
            found.append(kernel(device_type))
        except build.BuildError as error:
            say(f"no {device_type} kernels: {error}")
    return found


def kernel_builder():
    """torch's BuildExtension, one extension at a time, so that one's failure is its own."""
    from torch.utils.cpp_extension import BuildExtension

    class BuildKernels(BuildExtension):
        def build_extensions(self) -> None:
            extensions = self.extensions
            for extension in extensions:
                self.extensions = [extension]
                library = Path(self.get_ext_fullpath(extension.name))
                try:
                    library.unlink(missing_ok=True)  # Windows refuses where it is in use
                    super().build_extensions()
                except Exception as error:  # whatever it is, the package works without
                    say(f"no {extension.name}: {error}")
                    continue
                if library.is_file() and extension.name.startswith("rmipo_lite._native"):
                    build.write_record(library, build.source_hash())
            self.extensions = extensions

        def get_ext_filename(self, fullname: str) -> str:
            """The same name on every Python and setuptools, which differ in what follows abi3."""
            package, _, name = fullname.rpartition(".")
            if name.startswith("_native_"):
                return os.path.join(package, build.library_name(name.removeprefix("_native_")))
            return super().get_ext_filename(fullname)

        def copy_extensions_to_source(self) -> None:
            """For an editable install; the record of a library goes with it."""
            try:
                super().copy_extensions_to_source()
            except PermissionError as error:  # Windows: a program has the former one loaded
                say(f"what is in use stays as it is: {error}")
            for record in (Path(self.build_lib) / PACKAGE.name).glob("_native_*.sha256"):
                shutil.copy(record, PACKAGE)

    return BuildKernels


class BuildPy(build_py):
    """Puts the kernels' sources into a wheel, for where they are compiled at first use."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / PACKAGE.name / "csrc"
            shutil.copytree(ROOT / "csrc", target, dirs_exist_ok=True)


if "VSCMD_ARG_TGT_ARCH" in os.environ:  # in Visual Studio's prompt: BuildExtension insists on it
    os.environ.setdefault("DISTUTILS_USE_SDK", "1")
native = kernels()
setup(
    packages=find_packages(include=["rmipo_lite", "rmipo_lite.*"]),
    package_data={
        "rmipo_lite.demo": ["assets/*", "assets/**/*"],
        "rmipo_lite.cli": ["accelerate_configs/*.yaml"],
        "rmipo_lite.export": ["texts.json"],
        "rmipo_lite.planning": ["cards.csv"],
    },
    ext_modules=native + bindings(),
    cmdclass={"build_py": BuildPy, "build_ext": kernel_builder() if native else build_ext},
)
