"""Finding, building and loading the library: what is missing never stops the work."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from rmipo_lite.ops import build, library, linear_logps, native
from tests.conftest import ROOT


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


def test_a_closed_standard_error_costs_a_line(monkeypatch) -> None:
    closed = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
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


def test_a_device_without_kernels_says_so() -> None:
    assert library.status("mps").reason == "the kernels are for CPUs and NVIDIA's GPUs alone"


def hold(path: Path) -> subprocess.Popen[str]:
    """Another process that has the lock until its input ends."""
    code = (
        "import sys, filelock\n"
        "lock = filelock.FileLock(sys.argv[1])\n"
        "lock.acquire()\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def test_a_held_lock_is_waited_for_with_a_limit(
    monkeypatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(library, "_SILENCE_S", 0.1)
    monkeypatch.setattr(library, "_LOCK_LIMIT_S", 0.5)
    with hold(tmp_path / "lock") as holder:
        started = time.monotonic()
        with pytest.raises(build.BuildError, match=r"another process has held .*lock for 0 s"):
            library._file_lock(tmp_path / "lock").__enter__()
        assert time.monotonic() - started < 4
        holder.kill()
    assert capsys.readouterr().err.count("waiting for another process") == 1


@pytest.mark.parametrize("end", [signal.SIGKILL, None])
def test_who_waits_gets_the_lock_when_its_holder_ends(
    end: int | None, monkeypatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed or by itself; and whoever waits says so, once."""
    monkeypatch.setattr(library, "_SILENCE_S", 0.1)
    monkeypatch.setattr(library, "_LOCK_LIMIT_S", 60.0)
    with hold(tmp_path / "lock") as holder:
        ended = holder.send_signal if end else holder.stdin.close
        threading.Timer(0.5, ended, [end] if end else []).start()
        with library._file_lock(tmp_path / "lock"):
            told = capsys.readouterr().err
    assert told == "rmipo_lite: waiting for another process that compiles the kernels\n"


def test_a_lock_nobody_holds_is_taken_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a killed holder left is a file without a lock."""
    (tmp_path / "lock").write_text("", encoding="utf-8")
    for _ in range(2):
        with library._file_lock(tmp_path / "lock"):
            pass
    assert capsys.readouterr().err == ""


def test_a_forked_child_does_not_keep_its_parents_lock(monkeypatch, tmp_path: Path) -> None:
    """The parent is killed while it compiles; a worker that it had forked lives on."""
    code = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from rmipo_lite.ops import library\n"
        "with library._file_lock(Path(sys.argv[1])):\n"
        "    if os.fork() == 0:\n"
        "        print('forked', flush=True)\n"
        "        time.sleep(60)\n"
        "        os._exit(0)\n"
        "    time.sleep(60)\n"
    )
    path = tmp_path / "lock"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], env=env, text=True, stdout=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    monkeypatch.setattr(library, "_LOCK_LIMIT_S", 1.0)
    with parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "forked\n"
        parent.kill()
        try:
            with library._file_lock(path):
                pass
        finally:
            os.killpg(parent.pid, signal.SIGKILL)


def test_a_filesystem_without_locks(
    no_prebuilt, monkeypatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not a file that locks by being there: it would outlive a killed build."""
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(build, "build", fake_build)
    monkeypatch.setattr(library, "_open", lambda library, _: None)
    monkeypatch.setenv("RMIPO_LITE_CACHE", str(tmp_path / "cache"))
    reason = library._load("cpu").reason or ""
    assert re.search(r"\.lock can't be locked: .*Function not implemented$", reason)
    assert capsys.readouterr().err == ""


@pytest.fixture
def windows(monkeypatch, tmp_path: Path) -> set[Path]:
    """Files that are loaded: as on Windows they can be renamed, not replaced and not removed."""
    loaded: set[Path] = set()
    replace, rmtree = os.replace, shutil.rmtree

    def rename(source: Path, target: Path) -> None:
        if target in loaded:
            raise PermissionError(errno.EACCES, "Access is denied", str(source), None, str(target))
        replace(source, target)
        if source in loaded:
            loaded.remove(source)
            loaded.add(target)

    def remove(folder: Path, ignore_errors: bool = False) -> None:
        kept = [file for file in loaded if file.parent == folder]
        assert ignore_errors or not kept
        for file in folder.iterdir() if kept else ():
            if file not in kept:
                file.unlink()
        if not kept:
            rmtree(folder)

    monkeypatch.setattr(os, "replace", rename)
    monkeypatch.setattr(shutil, "rmtree", remove)
    monkeypatch.setattr(build, "PLATFORM", "win32")
    monkeypatch.setattr(build, "require_tools", lambda device_type: None)
    monkeypatch.setattr(build, "build", fake_build)
    monkeypatch.setattr(library, "_open", lambda file, _: loaded.add(file))
    monkeypatch.setenv("RMIPO_LITE_CACHE", str(tmp_path / "cache"))
    return loaded


def test_on_windows_a_loaded_library_is_renamed_into_place(no_prebuilt, windows: set[Path]) -> None:
    target = library.cached_library("cpu")
    assert library._load("cpu") == (True, "built", str(target), None)
    assert target.name == "_native_cpu.pyd"
    assert windows == {target}
    assert library._matches(target)
    assert not list(target.parent.parent.glob("build-*"))


def test_on_windows_a_library_in_use_is_replaced_by_the_next_process(
    no_prebuilt, windows: set[Path], monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that isn't ours lies there with its record: this process loads it to find that out."""
    target = library.cached_library("cpu")
    target.parent.mkdir(parents=True)
    target.write_bytes(b"foreign")
    build.write_record(target, "")

    def open_foreign(file: Path, device_type: str) -> None:
        windows.add(file)
        if file.read_bytes() == b"foreign":
            raise build.BuildError("no kernels")

    monkeypatch.setattr(library, "_open", open_foreign)
    found = library._load("cpu")
    assert found.kind == "built"
    used = Path(found.path or "")
    assert used.parent.name.startswith("build-")
    assert used.read_bytes() == b"a whole library"
    assert f"{target} is in use by a program, so the next one compiles again" in (
        capsys.readouterr().err
    )
    windows.clear()  # the process ends
    assert library._load("cpu") == (True, "built", str(target), None)
    assert target.read_bytes() == b"a whole library"
    assert not list(target.parent.parent.glob("build-*"))
