"""Finding, building and loading the extension: what is missing never stops the work."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rmipo_lite.ops import build, linear_logps, native

ROOT = Path(__file__).resolve().parent.parent.parent
PROBE = """
from pathlib import Path
from rmipo_lite.ops import native
native._PACKAGE = Path("no prebuilt library")
print(native.status("cpu").kind, native.status("cpu").reason, sep="|")
"""


def start(cache: Path) -> subprocess.Popen[str]:
    env = {**os.environ, "RMIPO_LITE_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    env.setdefault("PYTHONPATH", str(ROOT))
    return subprocess.Popen(
        [sys.executable, "-c", PROBE], env=env, cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> list[str]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out.strip().split("|")


@pytest.mark.slow
def test_four_processes_build_once(tmp_path: Path) -> None:
    """At once, on an empty cache whose path has a blank and an umlaut."""
    cache = tmp_path / "a b" / "ü"
    answers = [finish(p) for p in [start(cache) for _ in range(4)]]
    assert {answer[1] for answer in answers} == {"None"}
    assert sorted(answer[0] for answer in answers) == ["built", "cached", "cached", "cached"]
    assert len(list(cache.rglob("*.so"))) == 1
    assert not list(cache.glob("build-*"))
    assert not list(cache.rglob("lock"))  # torch's own, which nothing would ever release


@pytest.fixture
def no_prebuilt(monkeypatch, tmp_path: Path) -> None:
    """This process starts anew: nothing loaded, nothing warned of, no prebuilt library."""
    monkeypatch.setattr(native, "_PACKAGE", tmp_path)
    monkeypatch.setattr(native, "_statuses", {})
    monkeypatch.setattr(native, "_warned", set())


def test_a_corrupt_library_is_not_loaded(no_prebuilt, monkeypatch, tmp_path: Path) -> None:
    opened: list[Path] = []
    monkeypatch.setattr(native, "_opens", lambda library, _: not opened.append(library))
    monkeypatch.setattr(native, "_open", lambda library, _: None)
    monkeypatch.setattr(build, "build", fake_build)
    monkeypatch.setenv("RMIPO_LITE_CACHE", str(tmp_path / "cache"))
    library = Path(native._load("cpu").path or "")
    library.write_bytes(b"half")
    # Without a compiler there is no way to repair it, so plain PyTorch does the work.
    monkeypatch.setattr(build, "build", refuse_build)
    assert native._load("cpu") == (False, None, None, "no compiler")
    assert not opened
    library.write_bytes(b"a whole library")
    assert native._load("cpu").kind == "cached"
    assert opened == [library]


def fake_build(device_type: str, folder: Path, architectures: str) -> Path:
    library = folder / build.library_name(device_type)
    library.write_bytes(b"a whole library")
    return library


def refuse_build(device_type: str, folder: Path, architectures: str) -> Path:
    raise build.BuildError("no compiler")


def test_a_compiler_that_does_not_exist(no_prebuilt, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RMIPO_LITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    reason = "the compiler 'no-such-compiler' of $CXX was not found"
    assert native._load("cpu") == (False, None, None, reason)


def test_a_cache_that_cannot_be_made(no_prebuilt, monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("RMIPO_LITE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="plain PyTorch does the work on cpu.*Not a directory"):
        value = linear_logps(torch.ones(2, 3), torch.ones(4, 3), torch.zeros(2).long())
    assert value.exp().tolist() == pytest.approx([0.25, 0.25])


def test_missing_extension_warns_once_and_native_refuses(monkeypatch) -> None:
    missing = native.BackendStatus(False, None, None, "no C++ compiler")
    monkeypatch.setattr(native, "_statuses", {"cpu": missing})
    monkeypatch.setattr(native, "_warned", set())
    cpu = torch.device("cpu")
    with pytest.warns(UserWarning, match="plain PyTorch does the work on cpu.*no C\\+\\+ compiler"):
        assert not native.use_native("auto", cpu)
    assert not native.use_native("auto", cpu)  # a second warning would be an error here
    with pytest.raises(RuntimeError, match="for cpu is missing: no C\\+\\+ compiler"):
        native.use_native("native", cpu)


def test_no_compiler_on_path(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler \(g\+\+\) was found"):
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


def test_a_device_without_kernels_says_so() -> None:
    assert native.status("mps").reason == "there are no kernels for mps"


def test_a_forked_child_does_not_hang() -> None:
    """Its parent's thread pool is gone: the child works in one thread."""
    code = (
        "import os, torch\n"
        "from rmipo_lite.ops import linear_logps\n"
        "torch.set_num_threads(2)\n"
        "a = torch.randn(600, 64), torch.randn(3000, 64), torch.zeros(600, dtype=torch.int64)\n"
        "want = linear_logps(*a, impl='native').sum()\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    os._exit(0 if torch.isclose(linear_logps(*a, impl='native').sum(), want) else 1)\n"
        "assert os.waitpid(pid, 0)[1] == 0\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, check=True, timeout=60)


def test_host_functions_of_the_bindings(tmp_path: Path) -> None:
    """64-bit addresses past 2^31, id classes, gamma: the header the kernels share, from C++."""
    pybind11 = pytest.importorskip("pybind11")
    import importlib.util
    import sysconfig

    library = tmp_path / "_bindings.so"
    paths = ["-I" + pybind11.get_include(), "-I" + sysconfig.get_path("include")]
    source = str(build.source_dir() / "bindings.cpp")
    command = [*build.compiler(), "-std=c++20", "-O0", "-shared", "-fPIC", *paths, source]
    subprocess.run([*command, "-o", str(library)], check=True, timeout=120)
    spec = importlib.util.spec_from_file_location("_bindings", library)
    bindings = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bindings)
    assert bindings.row_offset(14_135, 151_936, 7) == 14_135 * 151_936 + 7
    assert bindings.row_offset(2**24, 2**16, 1) == 2**40 + 1
    kinds = [bindings.classify(i, 10) for i in (0, 9, -100, -1, 10, 2**40, 2**32)]
    assert kinds == ["scored", "scored", "ignored", "invalid", "invalid", "invalid", "invalid"]
    assert bindings.adaptive_gamma(float("inf"), 0.3, 1.6) == 0.3
    assert "cplusplus" in bindings.build_info()


def test_a_held_lock_is_waited_for_with_a_limit(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "_LOCK_LIMIT_S", 0.2)
    started = time.monotonic()
    with (
        native._file_lock(tmp_path / "lock"),
        pytest.raises(build.BuildError, match="another process has held"),
        native._file_lock(tmp_path / "lock"),
    ):
        pass
    assert time.monotonic() - started < 5
