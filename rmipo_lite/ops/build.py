"""Compiling `csrc/` into one shared library per device type. Used by `native` and by `setup.py`.

`setup.py` hands the extensions described here to torch's BuildExtension; the first use of an
install without them compiles with `torch.utils.cpp_extension.load` and ninja. That runs in a child
process: load() would load the library from a folder that is about to be renamed, reads its
settings from the environment, prints, and can't be given a time limit.

Linux compiles with gcc or clang, macOS (the CPU's library alone) with Apple's clang, Windows with
Visual Studio's cl, which is the one that load() calls there.

The libraries use LibTorch's stable ABI: seconds to compile, and one binary serves many versions.
CPU and CUDA are separate libraries, since one linked to CUDA won't load without it. torch is
imported only inside functions: `setup.py` loads this file where torch may be absent.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

# LibTorch 2.10: the oldest stable ABI that has what we call, so one binary loads on torch >= 2.11.
_TARGET = "0x020a000000000000"
# Real architectures of an ahead-of-time build; PTX of the last one serves what comes after.
CUDA_ARCHITECTURES = "7.5;8.0;8.6;8.9;9.0;12.0+PTX"
_COMPILE_LIMIT_S = 600
PLATFORM = sys.platform
# What a compiler's or linker's message of failure begins with: `a.cpp:1:2: error: ...` of gcc and
# clang, `a.cpp(1): error C2065: ...` and `LINK : fatal error LNK1104: ...` of Microsoft.
_ERROR = re.compile(r"\b(error|fatal)( [A-Z]+\d+)?\s*:")
_COMPILERS = {
    "win32": (
        ["cl"],
        "no C++ compiler (cl) was found; install the Visual Studio Build Tools with C++ and start "
        "from their 'x64 Native Tools Command Prompt'",
    ),
    "darwin": (
        ["clang++", "c++"],
        "no C++ compiler (clang++) was found; install it with 'xcode-select --install'",
    ),
    "linux": (
        ["g++", "c++", "clang++"],
        "no C++ compiler (g++) was found; install one, for instance with 'apt install g++'",
    ),
}

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


def extension_name(device_type: str) -> str:
    """Name of a device type's extension module, which holds no Python object."""
    return f"_native_{device_type}"


def library_name(device_type: str) -> str:
    """File name of a device type's library, the one setuptools gives to a limited-API module."""
    return extension_name(device_type) + (".pyd" if PLATFORM == "win32" else ".abi3.so")


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


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_record(library: Path, sources: str) -> None:
    """Write the hash of a library and that of its sources beside it; `native` compares both."""
    text = f"{file_hash(library)} {sources}\n"
    library.with_suffix(".sha256").write_text(text, encoding="utf-8")


def compiler() -> list[str]:
    """The C++ compiler as a command: $CXX, else the first of the platform's that is found.

    On Windows it is cl whatever $CXX says.

    Raises:
        BuildError: there is none.
    """
    if PLATFORM not in _COMPILERS:
        raise BuildError(f"it is built for Linux, macOS and Windows, not for {PLATFORM}")
    names, missing = _COMPILERS[PLATFORM]
    if os.environ.get("CXX") and PLATFORM != "win32":
        try:
            command = shlex.split(os.environ["CXX"])
        except ValueError as error:
            raise BuildError(f"$CXX is no command: {error}") from error
        if not command or not shutil.which(command[0]):
            raise BuildError(f"the compiler {''.join(command[:1])!r} of $CXX was not found")
        return command
    found = next((name for name in names if shutil.which(name)), None)
    if not found or (PLATFORM == "darwin" and not _has_apple_tools()):
        raise BuildError(missing)
    if PLATFORM == "win32" and os.environ.get("VSCMD_ARG_TGT_ARCH") == "x86":
        raise BuildError("the compiler (cl) on PATH makes 32-bit code; start from the "
                         "'x64 Native Tools Command Prompt'")  # fmt: skip
    return [found]


def _has_apple_tools() -> bool:
    """Whether macOS's compiler is more than the stand-in that asks to install it."""
    try:
        return subprocess.run(["xcode-select", "-p"], capture_output=True).returncode == 0
    except OSError:
        return True  # where there is none of Apple's, the compiler isn't Apple's either


def ninja_path() -> str:
    """The PATH on which ninja is found.

    pip puts ninja beside Python, which is on PATH only where the environment is activated.

    Raises:
        BuildError: there is no ninja.
    """
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    if not shutil.which("ninja", path=path):
        raise BuildError("no ninja was found; install it with 'pip install ninja'")
    return path


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
                capture_output=True, encoding="utf-8", errors="replace", timeout=60, check=False,
            ).stderr  # fmt: skip
        except (OSError, subprocess.TimeoutExpired):
            told = ""
        candidates += re.findall(r"^#\$ TOP=(.+)$", told, re.MULTILINE)
        candidates.append(str(Path(nvcc).resolve().parent.parent))
    candidates.append("/usr/local/cuda")
    executable = "nvcc.exe" if PLATFORM == "win32" else "nvcc"
    for candidate in candidates:
        if not candidate:
            continue
        root = Path(candidate.strip())
        files = (root / "include" / "cuda_runtime.h", root / "bin" / executable)
        if all(file.is_file() for file in files):
            return root
    raise BuildError("no CUDA toolkit (nvcc) was found; install one or set CUDA_HOME to its root")


def source_files(device_type: str) -> list[Path]:
    """The sources of a device type's library, in a fixed order."""
    return sorted(
        path
        for path in (source_dir() / device_type).iterdir()
        if path.suffix == ".cpp" or path.name.endswith("_kernel.cu")
    )


def compile_flags(device_type: str) -> dict[str, list[str]]:
    """Flags of a device type's library by compiler, beside those that torch adds itself."""
    defines = [f"TORCH_TARGET_VERSION={_TARGET}"] + ["USE_CUDA"] * (device_type == "cuda")
    shared = ["-O3", *(f"-D{define}" for define in defines)]
    if PLATFORM == "win32":
        # nvcc refuses a second -std, and here torch gives it one whatever stands in ours.
        cxx = ["/O2", *(f"/D{define}" for define in defines), "/openmp:experimental", "/std:c++20"]
        return {"cxx": cxx, "nvcc": [*shared, "-Xcompiler=/Zc:__cplusplus"]}
    # Without the last two gcc leaves the loops with an exponential as they are: four times slower.
    vectorise = ["-fopenmp-simd", "-fno-trapping-math", "-fno-math-errno"]
    cxx = [*shared, *vectorise, "-std=c++20", "-fvisibility=hidden"]
    return {"cxx": cxx, "nvcc": [*shared, "-std=c++17", "-Xcompiler=-fvisibility=hidden"]}


def static_cuda_runtime(root: Path) -> list[str]:
    """Linker arguments for a CUDA runtime inside the library.

    The runtime of whatever toolkit is here then works beside the one that torch loads.
    """
    name, system = "libcudart_static.a", ["-ldl", "-lrt", "-lpthread"]
    folders = ["lib64", "lib", "targets/x86_64-linux/lib"]
    if PLATFORM == "win32":
        name, system, folders = "cudart_static.lib", [], ["lib/x64"]
    for folder in folders:
        archive = root / folder / name
        if archive.is_file():
            return [str(archive), *system]
    raise BuildError(f"the CUDA toolkit in {root} has no {name}")


def require_tools(device_type: str) -> None:
    """Refuse what would fail for want of a tool, before anybody is told to wait for it.

    Raises:
        BuildError: no compiler, ninja or toolkit.
    """
    compiler()
    ninja_path()
    if device_type == "cuda":
        static_cuda_runtime(cuda_home())


def build(device_type: str, folder: Path, architectures: str = "") -> Path:
    """Compile a device type's library inside `folder`, which exists, and return its path.

    `architectures` is a TORCH_CUDA_ARCH_LIST, for CUDA only.

    Raises:
        BuildError: no compiler, ninja or toolkit, the compiler's first error, or no end in time.
    """
    environment = {
        **os.environ,
        "CXX": _one_word(compiler(), folder),
        "PATH": os.pathsep.join([ninja_path(), str(folder)]),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "PYTHONUTF8": "1",
        "MAX_JOBS": "4",
        "VSLANG": "1033",  # cl in English: ninja knows the lines that name included files by it
    }
    flags = compile_flags(device_type)
    link = []
    if device_type == "cuda":
        root = cuda_home()
        link = static_cuda_runtime(root)
        if PLATFORM != "win32":  # where load() quotes, and the linker drops what isn't needed
            # as-needed drops the shared runtime that load() adds after the static one
            link = ["-Wl,--as-needed", *map(shlex.quote, link)]
        environment.update(CUDA_HOME=str(root), TORCH_CUDA_ARCH_LIST=architectures)
    name = extension_name(device_type)
    arguments = {
        "name": name,
        "sources": [str(path) for path in source_files(device_type)],
        "extra_cflags": flags["cxx"],
        "extra_cuda_cflags": flags["nvcc"],
        "extra_ldflags": link,
        "build_directory": str(folder),
        "with_cuda": device_type == "cuda",
    }
    _run_child(arguments, environment)
    built = folder / library_name(device_type)
    (folder / f"{name}{'.pyd' if PLATFORM == 'win32' else '.so'}").rename(built)
    return built


def _one_word(command: list[str], folder: Path) -> str:
    """The compiler as one word without blanks, which torch's versions quote or don't.

    A command with arguments (`ccache g++`) or blanks becomes a script in `folder`; on Windows it
    is `cl` always.
    """
    if len(command) == 1 and shlex.quote(command[0]) == command[0]:
        return command[0]
    script = folder / "rmipo-cxx"
    script.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n', encoding="utf-8")
    script.chmod(0o700)
    return script.name


def _run_child(arguments: dict[str, Any], environment: dict[str, str]) -> None:
    """Run this file with the arguments of load().

    Raises:
        BuildError: it failed.
    """
    # -P: this file's folder must not become a place to import from
    command = [sys.executable, "-P", "-W", "ignore", __file__]
    try:
        done = subprocess.run(
            command, input=json.dumps(arguments), env=environment, capture_output=True,
            encoding="utf-8", errors="replace", timeout=_COMPILE_LIMIT_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"the compilation could not run: {error}") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        first = next(filter(_ERROR.search, lines), lines[-1])
        raise BuildError(f"the compilation failed: {first.strip()[:300]}")


def _load_in_child(arguments: dict[str, Any]) -> None:
    from torch.utils import cpp_extension

    if PLATFORM != "win32":
        # load() puts this path on the linker's command line as it is; a blank would end it there.
        cpp_extension.TORCH_LIB_PATH = shlex.quote(cpp_extension.TORCH_LIB_PATH)
    cpp_extension.load(**arguments, is_python_module=False)


if __name__ == "__main__":
    _load_in_child(json.load(sys.stdin))
