"""Finding, building and loading the extension: what is missing never stops the work."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rmipo_lite.ops import build, library, linear_logps, native

ROOT = Path(__file__).resolve().parent.parent.parent
PROBE = """
from pathlib import Path
from rmipo_lite.ops import library
library._PACKAGE = Path("no prebuilt library")
print(library.status("cpu").kind, library.status("cpu").reason, sep="|")
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
    monkeypatch.setattr(library, "_PACKAGE", tmp_path)
    monkeypatch.setattr(library, "_statuses", {})
    monkeypatch.setattr(native, "_warned", set())


def test_a_corrupt_library_is_not_loaded(no_prebuilt, monkeypatch, tmp_path: Path) -> None:
    opened: list[Path] = []
    monkeypatch.setattr(library, "_opens", lambda file, _: not opened.append(file))
    monkeypatch.setattr(library, "_open", lambda file, _: None)
    monkeypatch.setattr(build, "build", fake_build)
    monkeypatch.setenv("RMIPO_LITE_CACHE", str(tmp_path / "cache"))
    file = Path(library._load("cpu").path or "")
    file.write_bytes(b"half")
    # Without a compiler there is no way to repair it, so plain PyTorch does the work.
    monkeypatch.setattr(build, "build", refuse_build)
    assert library._load("cpu") == (False, None, None, "no compiler")
    assert not opened
    file.write_bytes(b"a whole library")
    assert library._load("cpu").kind == "cached"
    assert opened == [file]


def fake_build(device_type: str, folder: Path, architectures: str) -> Path:
    file = folder / build.library_name(device_type)
    file.write_bytes(b"a whole library")
    return file


def refuse_build(device_type: str, folder: Path, architectures: str) -> Path:
    raise build.BuildError("no compiler")


def test_a_foreign_library_is_not_taken_for_ours(tmp_path: Path) -> None:
    """It loads, and its hash is right; a process of its own, since this one has the kernels."""
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from rmipo_lite.ops import build, library\n"
        "file = Path(sys.argv[1])\n"
        "build.write_record(file, '')\n"
        "assert library._matches(file) and not library._opens(file, 'cpu')\n"
        "library._open(file, 'cpu')\n"
    )
    source, file = tmp_path / "foreign.cpp", tmp_path / "foreign.so"
    source.write_text('extern "C" int nothing_of_ours() { return 1; }')
    command = [*build.compiler(), "-shared", "-fPIC", str(source), "-o", str(file)]
    subprocess.run(command, check=True, timeout=120)
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)], env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "foreign.so loads but has no kernel row_logps for cpu" in done.stderr


def test_what_a_killed_build_left_is_removed(no_prebuilt, monkeypatch, tmp_path: Path) -> None:
    """Of the same key alone: another's may be in progress. And the cache is for its owner."""
    cache = tmp_path / "cache"
    monkeypatch.setattr(library, "_open", lambda library, _: None)
    monkeypatch.setattr(build, "build", fake_build)
    monkeypatch.setenv("RMIPO_LITE_CACHE", str(cache))
    key = library.cached_library("cpu").parent.name
    assert library._load("cpu").kind == "built"
    assert cache.stat().st_mode & 0o777 == 0o700
    for name in (f"build-{key}-abc", "build-0123-abc"):
        (cache / name).mkdir()
        (cache / name / "lock").touch()
    (cache / key / build.library_name("cpu")).unlink()
    assert library._load("cpu").kind == "built"
    assert [path.name for path in cache.glob("build-*")] == ["build-0123-abc"]


def test_a_library_that_does_not_load_is_not_published(
    no_prebuilt, monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(build, "build", fake_build)
    monkeypatch.setenv("RMIPO_LITE_CACHE", str(tmp_path / "cache"))
    found = library._load("cpu")
    assert re.match(r"the library does not load: .*abi3.so: (file too short|invalid)", found.reason)
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_a_record_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.so").write_bytes(b"a library")
    (tmp_path / "a.sha256").write_bytes(b"\xff\xfe\x00")
    assert not library._matches(tmp_path / "a.so")


def test_nobody_is_told_to_wait_for_a_build_that_cannot_start(
    no_prebuilt, monkeypatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RMIPO_LITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not library._load("cpu").available
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("command", [" ", "g++ '"])
def test_a_compiler_that_is_no_command(command: str, monkeypatch) -> None:
    monkeypatch.setenv("CXX", command)
    with pytest.raises(build.BuildError, match=r"of \$CXX was not found|\$CXX is no command"):
        build.compiler()


def test_a_closed_standard_error_costs_a_line(monkeypatch) -> None:
    closed = open(os.devnull, "w")  # noqa: SIM115
    closed.close()
    for stream in (closed, None):
        monkeypatch.setattr(sys, "stderr", stream)
        library._tell("compiling")


def test_a_forked_child_does_not_wait_for_a_thread_that_held_the_lock() -> None:
    code = (
        "import os, threading\n"
        "from rmipo_lite.ops import library\n"
        "library._lock.acquire()\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    library.status('mps')\n"
        "    os._exit(0)\n"
        "assert os.waitpid(pid, 0)[1] == 0\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, check=True, timeout=60)


def test_a_compiler_that_does_not_exist(no_prebuilt, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RMIPO_LITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    reason = "the compiler 'no-such-compiler' of $CXX was not found"
    assert library._load("cpu") == (False, None, None, reason)


def test_a_cache_that_cannot_be_made(no_prebuilt, monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("RMIPO_LITE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="plain PyTorch does the work on cpu.*Not a directory"):
        value = linear_logps(torch.ones(2, 3), torch.ones(4, 3), torch.zeros(2).long())
    assert value.exp().tolist() == pytest.approx([0.25, 0.25])


def test_missing_extension_warns_once_and_native_refuses(monkeypatch) -> None:
    missing = library.BackendStatus(False, None, None, "no C++ compiler")
    monkeypatch.setattr(library, "_statuses", {"cpu": missing})
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
    assert library.status("mps").reason == "there are no kernels for mps"


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


def test_a_held_lock_is_waited_for_with_a_limit(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "_LOCK_LIMIT_S", 0.2)
    started = time.monotonic()
    with (
        library._file_lock(tmp_path / "lock"),
        pytest.raises(build.BuildError, match="another process has held"),
        library._file_lock(tmp_path / "lock"),
    ):
        pass
    assert time.monotonic() - started < 5


def test_who_waits_says_so_once(
    monkeypatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(library, "_LOCK_LIMIT_S", 0.5)
    monkeypatch.setattr(library, "_SILENCE_S", 0.1)
    with (
        library._file_lock(tmp_path / "lock"),
        pytest.raises(build.BuildError),
        library._file_lock(tmp_path / "lock"),
    ):
        pass
    assert capsys.readouterr().err.count("waiting for another process") == 1
