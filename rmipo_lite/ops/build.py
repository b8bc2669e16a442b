"""Compiling `csrc/` into one shared library per device type. Used by `native` and by `setup.py`.

The compilers are called directly instead of through torch.utils.cpp_extension: the libraries use
LibTorch's stable ABI, so a file needs one include path and no Python headers; there is no ninja to
miss, no lock file that a killed build leaves behind for ever, and a path with spaces is just an
argument. CPU and CUDA are separate libraries, since one linked to CUDA won't load without it.

torch is imported only inside functions: `setup.py` loads this file where torch may be absent.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# LibTorch 2.10: the oldest stable ABI that has what we call, so one binary loads on torch >= 2.11.
_TARGET = "0x020a000000000000"
# Real architectures of an ahead-of-time build; PTX of the last one serves what comes after.
CUDA_ARCHITECTURES = ("75", "80", "86", "89", "90", "120")
_COMPILE_LIMIT_S = 600

_PACKAGE = Path(__file__).resolve().parent.parent


class BuildError(RuntimeError):
    """The library can't be built here; the message is one line that names what is missing."""


def source_dir() -> Path:
    """Where the C++ sources are: inside an installed package, or beside it in a checkout.

    Raises:
        BuildError: neither has them.
    """
    for folder in (_PACKAGE / "csrc", _PACKAGE.parent / "csrc"):
        if (folder / "row_math.h").is_file():
            return folder
    raise BuildError(f"the C++ sources are not beside the package in {_PACKAGE}")


def library_name(device_type: str) -> str:
    """File name of a device type's library."""
    return f"librmipo_lite_{device_type}.so"


def source_hash() -> str:
    """Hash of every source file and of this file: a library of other sources is never loaded.

    Raises:
        BuildError: the sources are absent.
    """
    digest = hashlib.sha256(Path(__file__).read_bytes())
    root = source_dir()
    for path in sorted(root.rglob("*")):
        if path.suffix in (".h", ".cpp", ".cu"):
            digest.update(path.relative_to(root).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def compiler() -> list[str]:
    """The C++ compiler as a command: $CXX, else g++, else c++, else clang++.

    Raises:
        BuildError: there is none.
    """
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    for name in ("g++", "c++", "clang++"):
        if shutil.which(name):
            return [name]
    raise BuildError("no C++ compiler (g++) was found; install one, for instance with "
                     "'apt install g++'")  # fmt: skip


def cuda_home() -> Path:
    """Root of the CUDA toolkit: where include/cuda_runtime.h is.

    The nvcc on PATH can be a wrapper, so it is asked where its toolkit is rather than resolved.

    Raises:
        BuildError: no toolkit.
    """
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    nvcc = shutil.which("nvcc")
    if nvcc:
        try:
            told = subprocess.run(
                [nvcc, "--dryrun", "-x", "cu", os.devnull, "-c", "-o", os.devnull],
                capture_output=True, text=True, timeout=60, check=False,
            ).stderr  # fmt: skip
        except (OSError, subprocess.TimeoutExpired):
            told = ""
        candidates += re.findall(r"^#\$ TOP=(.+)$", told, re.MULTILINE)
        candidates.append(str(Path(nvcc).resolve().parent.parent))
    candidates.append("/usr/local/cuda")
    for candidate in candidates:
        if not candidate:
            continue
        root = Path(candidate.strip())
        if (root / "include" / "cuda_runtime.h").is_file() and (root / "bin" / "nvcc").is_file():
            return root
    raise BuildError("no CUDA toolkit (nvcc) was found; install one or set CUDA_HOME to its root")


def _run(command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=_COMPILE_LIMIT_S,
            check=False,
        )
    except FileNotFoundError as error:
        raise BuildError(f"the compiler {command[0]!r} was not found") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} could not run: {error}") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line.lower()]
        first = lines[0] if lines else (done.stderr.strip() or "no message")[:300]
        raise BuildError(f"{command[0]} failed: {first}")


def _gencode(architectures: tuple[str, ...]) -> list[str]:
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    newest = architectures[-1]
    return [*flags, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


def build(
    device_type: str, folder: Path, architectures: tuple[str, ...] = CUDA_ARCHITECTURES
) -> Path:
    """Compile a device type's library inside `folder` and return its path.

    Raises:
        BuildError: no compiler, no toolkit, or the compiler's first error.
    """
    from torch.utils.cpp_extension import include_paths, library_paths

    sources, cxx = source_dir(), compiler()
    common = [
        "-std=c++20",
        "-O3",
        "-fPIC",
        "-fvisibility=hidden",
        f"-DTORCH_TARGET_VERSION={_TARGET}",
    ]
    common += [flag for path in include_paths() for flag in ("-isystem", path)]
    libraries = [f"-L{path}" for path in library_paths()] + ["-lc10", "-ltorch_cpu", "-ltorch"]
    commands, objects = [], []
    linker = cxx
    if device_type == "cuda":
        root = cuda_home()
        nvcc = str(root / "bin" / "nvcc")
        common += ["-isystem", str(root / "include"), "-DUSE_CUDA"]
        # -cudart static: the runtime of whatever toolkit is here works beside the one torch loads.
        linker = [nvcc, "-cudart", "static"]
        libraries.append("-ltorch_cuda")
        for path in sorted((sources / "cuda").glob("*_kernel.cu")):
            objects.append(folder / f"{path.stem}.o")
            flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
            flags += _gencode(architectures)
            commands.append([nvcc, *flags, "-c", str(path), "-o", str(objects[-1])])
    for path in sorted((sources / device_type).glob("*.cpp")):
        objects.append(folder / f"{path.stem}.o")
        commands.append([*cxx, *common, "-fopenmp-simd", "-c", str(path), "-o", str(objects[-1])])
    with ThreadPoolExecutor(max_workers=4) as pool:
        list(pool.map(lambda command: _run(command, folder), commands))
    target = folder / library_name(device_type)
    _run([*linker, "-shared", *map(str, objects), "-o", str(target), *libraries], folder)
    return target
