"""Compiling the extension: the commands of each system, and what is said where one is missing."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from rmipo_lite.ops import build

TARGET = "TORCH_TARGET_VERSION=0x020a000000000000"
POSIX = ["-fopenmp-simd", "-fno-trapping-math", "-fno-math-errno", "-std=c++20",
         "-fvisibility=hidden"]  # fmt: skip


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_flags_of_gcc_and_clang(platform: str, monkeypatch) -> None:
    monkeypatch.setattr(build, "PLATFORM", platform)
    assert build.compile_flags("cpu")["cxx"] == ["-O3", f"-D{TARGET}", *POSIX]
    assert build.compile_flags("cuda") == {
        "cxx": ["-O3", f"-D{TARGET}", "-DUSE_CUDA", *POSIX],
        "nvcc": [
            "-O3",
            f"-D{TARGET}",
            "-DUSE_CUDA",
            "-std=c++17",
            "-Xcompiler=-fvisibility=hidden",
        ],
    }


def test_flags_of_msvc(monkeypatch) -> None:
    """Without /MD, /EHsc and nvcc's -std, which torch gives on Windows."""
    monkeypatch.setattr(build, "PLATFORM", "win32")
    rest = ["/openmp:experimental", "/std:c++20"]
    assert build.compile_flags("cpu")["cxx"] == ["/O2", f"/D{TARGET}", *rest]
    assert build.compile_flags("cuda") == {
        "cxx": ["/O2", f"/D{TARGET}", "/DUSE_CUDA", *rest],
        "nvcc": ["-O3", f"-D{TARGET}", "-DUSE_CUDA", "-Xcompiler=/Zc:__cplusplus"],
    }


@pytest.mark.parametrize(
    ("platform", "name"),
    [
        ("linux", "_native_cpu.abi3.so"),
        ("darwin", "_native_cpu.abi3.so"),
        ("win32", "_native_cpu.pyd"),
    ],
)
def test_the_library_has_the_name_of_a_limited_api_module(
    platform: str, name: str, monkeypatch
) -> None:
    monkeypatch.setattr(build, "PLATFORM", platform)
    assert build.library_name("cpu") == name


def only_on_path(folder: Path, monkeypatch, programs: dict[str, str]) -> None:
    """No program but these, each with what it does; and no $CXX."""
    for name, does in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{does}\n", encoding="utf-8")
        (folder / name).chmod(0o700)
    monkeypatch.setenv("PATH", str(folder))
    for name in ("CXX", "VSCMD_ARG_TGT_ARCH"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("platform", "words"),
    [
        ("linux", r"\(g\+\+\) was found; install one, for instance with 'apt install g\+\+'"),
        ("darwin", r"\(clang\+\+\) was found; install it with 'xcode-select --install'"),
        ("win32", r"\(cl\) was found; install the Visual Studio Build Tools .* 'x64 Native Tools"),
        ("sunos5", "it is built for Linux, macOS and Windows, not for sunos5"),
    ],
)
def test_no_compiler_on_path(platform: str, words: str, monkeypatch, tmp_path: Path) -> None:
    only_on_path(tmp_path, monkeypatch, {})
    monkeypatch.setattr(build, "PLATFORM", platform)
    with pytest.raises(build.BuildError, match=words) as error:
        build.compiler()
    assert "\n" not in str(error.value)


def test_the_compiler_of_a_mac(monkeypatch, tmp_path: Path) -> None:
    """Not that of Linux' order, and not the stand-in that a Mac has before its tools."""
    monkeypatch.setattr(build, "PLATFORM", "darwin")
    only_on_path(tmp_path, monkeypatch, {"g++": "", "c++": "", "clang++": ""})
    assert build.compiler() == ["clang++"]
    only_on_path(tmp_path, monkeypatch, {"xcode-select": "exit 2"})
    with pytest.raises(build.BuildError, match="xcode-select --install"):
        build.compiler()
    only_on_path(tmp_path, monkeypatch, {"xcode-select": "exit 0"})
    assert build.compiler() == ["clang++"]


def test_the_compiler_of_windows(monkeypatch, tmp_path: Path) -> None:
    """torch calls cl whatever $CXX says; the plain developer prompt's makes 32-bit code."""
    only_on_path(tmp_path, monkeypatch, {"cl": ""})
    monkeypatch.setattr(build, "PLATFORM", "win32")
    monkeypatch.setenv("CXX", "clang-cl")
    monkeypatch.setenv("VSCMD_ARG_TGT_ARCH", "x64")
    assert build.compiler() == ["cl"]
    monkeypatch.setenv("VSCMD_ARG_TGT_ARCH", "x86")
    with pytest.raises(build.BuildError, match="makes 32-bit code; start from the 'x64 Native"):
        build.compiler()


def toolkit(root: Path, *files: str) -> Path:
    for name in ("include/cuda_runtime.h", *files):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_the_cuda_toolkit_of_windows(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "PLATFORM", "win32")
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "of linux", "bin/nvcc")))
    root = toolkit(tmp_path / "v13.0", "bin/nvcc.exe", "lib/x64/cudart_static.lib")
    monkeypatch.setenv("CUDA_PATH", str(root))
    assert build.cuda_home() == root
    assert build.static_cuda_runtime(root) == [str(root / "lib" / "x64" / "cudart_static.lib")]
    with pytest.raises(build.BuildError, match=r"of linux has no cudart_static\.lib"):
        build.static_cuda_runtime(tmp_path / "of linux")


@pytest.mark.parametrize(
    ("platform", "made", "archive", "link"),
    [
        ("linux", "so", "lib64/libcudart_static.a",
         ["-Wl,--as-needed", "'{root}/lib64/libcudart_static.a'", "-ldl", "-lrt", "-lpthread"]),
        ("win32", "pyd", "lib/x64/cudart_static.lib", ["{root}/lib/x64/cudart_static.lib"]),
    ],
)  # fmt: skip
def test_what_load_is_asked_for(
    platform: str, made: str, archive: str, link: list[str], monkeypatch, tmp_path: Path
) -> None:
    """On Windows load() quotes what has blanks; elsewhere it doesn't."""
    root = toolkit(tmp_path / "a b", "bin/nvcc", "bin/nvcc.exe", archive)
    asked: dict[str, Any] = {}

    def run_child(arguments: dict[str, Any], environment: dict[str, str]) -> None:
        asked.update(json.loads(json.dumps(arguments)), environment=environment)
        (tmp_path / f"_native_cuda.{made}").touch()

    monkeypatch.setattr(build, "PLATFORM", platform)
    monkeypatch.setattr(build, "_run_child", run_child)
    monkeypatch.setattr(build, "compiler", lambda: ["cl" if platform == "win32" else "g++"])
    monkeypatch.setenv("CUDA_HOME", str(root))
    built = build.build("cuda", tmp_path, "12.0+PTX")
    assert built == tmp_path / build.library_name("cuda")
    assert built.is_file()
    assert asked["extra_ldflags"] == [text.format(root=root) for text in link]
    assert asked["extra_cflags"] == build.compile_flags("cuda")["cxx"]
    assert asked["extra_cuda_cflags"] == build.compile_flags("cuda")["nvcc"]
    assert asked["environment"]["CXX"] == ("cl" if platform == "win32" else "g++")
    assert asked["environment"]["CUDA_HOME"] == str(root)


@pytest.mark.parametrize(
    "line",
    [
        "a.cpp:1:2: error: expected ')' before '{' token",
        "a.cpp:1:2: fatal error: torch/x.h: No such file or directory",
        "a.cpp(12): error C2065: 'x': undeclared identifier",
        "a.cpp(1): fatal error C1083: Cannot open include file: 'torch/x.h'",
        "LINK : fatal error LNK1104: cannot open file 'c10.lib'",
        "nvcc fatal   : Unsupported gpu architecture 'compute_10'",
    ],
)
def test_the_first_error_of_each_compiler_is_found(line: str, monkeypatch, tmp_path: Path) -> None:
    output = f"[1/2] cl /W3 -Werror error.cpp\n{line}\nanother: error: later\nninja: stopped."
    script = tmp_path / "fails.py"
    script.write_text(f"import sys\nsys.exit({output!r})\n", encoding="utf-8")
    monkeypatch.setattr(build, "__file__", str(script))
    with pytest.raises(build.BuildError) as error:
        build._run_child({}, dict(os.environ))
    assert str(error.value) == f"the compilation failed: {line}"


@pytest.mark.parametrize("command", [" ", "g++ '"])
def test_a_compiler_that_is_no_command(command: str, monkeypatch) -> None:
    monkeypatch.setenv("CXX", command)
    with pytest.raises(build.BuildError, match=r"of \$CXX was not found|\$CXX is no command"):
        build.compiler()


def test_no_ninja_anywhere(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(build.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(build.BuildError, match="no ninja was found; install it with 'pip install"):
        build.ninja_path()


def test_no_cuda_toolkit_anywhere(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    if Path("/usr/local/cuda/include/cuda_runtime.h").is_file():
        pytest.skip("this machine has a toolkit at the default place")
    with pytest.raises(build.BuildError, match=r"no CUDA toolkit \(nvcc\) was found"):
        build.cuda_home()


def test_the_compilers_first_error_is_the_message(monkeypatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken.cpp"
    broken.write_text("int f( {\n")
    monkeypatch.setattr(build, "source_files", lambda device_type: [broken])
    with pytest.raises(build.BuildError, match=r"^the compilation failed: .*broken.cpp.*error:.*"):
        build.build("cpu", tmp_path)


@pytest.mark.slow
def test_host_functions_of_the_bindings(tmp_path: Path) -> None:
    """64-bit addresses past 2^31, id classes, gamma: the header the kernels share, from C++."""
    pybind11 = pytest.importorskip("pybind11")
    import importlib.util
    import sysconfig

    file = tmp_path / "_bindings.so"
    paths = ["-I" + pybind11.get_include(), "-I" + sysconfig.get_path("include")]
    source = str(build.source_dir() / "bindings.cpp")
    command = [*build.compiler(), "-std=c++20", "-O0", "-shared", "-fPIC", *paths, source]
    subprocess.run([*command, "-o", str(file)], check=True, timeout=120)
    spec = importlib.util.spec_from_file_location("_bindings", file)
    bindings = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bindings)
    assert bindings.row_offset(14_135, 151_936, 7) == 14_135 * 151_936 + 7
    assert bindings.row_offset(2**24, 2**16, 1) == 2**40 + 1
    kinds = [bindings.classify(i, 10) for i in (0, 9, -100, -1, 10, 2**40, 2**32)]
    assert kinds == ["scored", "scored", "ignored", "invalid", "invalid", "invalid", "invalid"]
    assert bindings.adaptive_gamma(float("inf"), 0.3, 1.6) == 0.3
    assert "cplusplus" in bindings.build_info()
