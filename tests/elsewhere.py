"""The tests as if on another system (win32, darwin).

    SYSTEM=win32 python -m pytest -p tests.elsewhere

No such machine is needed. The package's own modules, and nothing else, see a Python that says it is
there and lacks what it lacks there. On Windows files follow its rules too: what is open can't be
renamed, replaced or deleted, what is mapped can be renamed alone, and a rename doesn't replace; the
console takes cp1252; a process is begun anew and never forked; and there is no compiler, so plain
PyTorch does the work. What a test starts as a program of its own runs as it does here.

The names are those that typeshed, the types of Python's own library, has for Linux and not for the
other system, of what Python 3.11 to 3.13 have.
"""

from __future__ import annotations

import builtins
import importlib.abc
import importlib.machinery
import multiprocessing
import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import pytest

SYSTEM = os.environ.get("SYSTEM", "win32")
LIMITED = (
    "os", "sys", "signal", "select", "socket", "time", "mmap", "resource", "psutil",
    "multiprocessing",
)  # fmt: skip
NO_MODULE = {
    "win32": {
        "_curses", "_posixsubprocess", "crypt", "curses", "fcntl", "grp", "nis", "ossaudiodev",
        "posix", "pty", "pwd", "readline", "resource", "spwd", "syslog", "termios", "tty",
    },
    "darwin": {"ossaudiodev", "spwd"},
}  # fmt: skip
NO_NAME = {
    "win32": """
        os.chown os.chroot os.confstr os.copy_file_range os.ctermid os.environb os.eventfd
        os.fchdir os.fchmod os.fchown os.fdatasync os.fork os.forkpty os.fpathconf os.fstatvfs
        os.fwalk os.get_blocking os.getegid os.getenvb os.geteuid os.getgid os.getgrouplist
        os.getgroups os.getloadavg os.getpgid os.getpgrp os.getpriority os.getrandom os.getresgid
        os.getresuid os.getsid os.getuid os.getxattr os.initgroups os.killpg os.lchown os.listxattr
        os.lockf os.login_tty os.major os.makedev os.memfd_create os.minor os.mkfifo os.mknod
        os.nice os.openpty os.pathconf os.pidfd_open os.pipe2 os.posix_fadvise os.posix_fallocate
        os.posix_spawn os.posix_spawnp os.pread os.preadv os.pwrite os.pwritev os.readv
        os.register_at_fork os.removexattr os.sched_getaffinity os.sched_setaffinity os.sched_yield
        os.sendfile os.set_blocking os.setegid os.seteuid os.setgid os.setgroups os.setpgid
        os.setpriority os.setregid os.setreuid os.setsid os.setuid os.setxattr os.spawnlp
        os.spawnvp os.splice os.statvfs os.sync os.sysconf os.tcgetpgrp os.tcsetpgrp os.ttyname
        os.uname os.wait os.wait3 os.wait4 os.waitid os.writev os.WNOHANG os.WEXITSTATUS
        os.WIFEXITED os.WIFSIGNALED os.WTERMSIG os.O_ACCMODE os.O_ASYNC os.O_CLOEXEC os.O_DIRECT
        os.O_DIRECTORY os.O_DSYNC os.O_NOATIME os.O_NOCTTY os.O_NOFOLLOW os.O_NONBLOCK os.O_PATH
        os.O_SYNC os.O_TMPFILE os.F_LOCK os.RTLD_GLOBAL os.RTLD_NOW os.SEEK_DATA os.SEEK_HOLE
        signal.ITIMER_REAL signal.SIGALRM signal.SIGBUS signal.SIGCHLD signal.SIGCONT signal.SIGHUP
        signal.SIGIO signal.SIGKILL signal.SIGPIPE signal.SIGPROF signal.SIGQUIT signal.SIGSTOP
        signal.SIGTRAP signal.SIGTSTP signal.SIGTTIN signal.SIGTTOU signal.SIGUSR1 signal.SIGUSR2
        signal.SIGWINCH signal.SIGXCPU signal.SIG_BLOCK signal.alarm signal.getitimer signal.pause
        signal.pthread_kill signal.pthread_sigmask signal.setitimer signal.siginterrupt
        signal.sigpending signal.sigtimedwait signal.sigwait signal.sigwaitinfo
        select.epoll select.poll select.PIPE_BUF socket.AF_UNIX socket.SO_REUSEPORT
        socket.recv_fds socket.send_fds socket.sethostname
        time.clock_getres time.clock_gettime time.clock_gettime_ns time.tzset
        time.CLOCK_MONOTONIC time.CLOCK_REALTIME
        mmap.MAP_SHARED mmap.MAP_PRIVATE mmap.PROT_READ mmap.PROT_WRITE mmap.MADV_DONTNEED
    """,
    "darwin": """
        os.copy_file_range os.eventfd os.fdatasync os.getrandom os.getresgid os.getresuid
        os.getxattr os.listxattr os.memfd_create os.pidfd_open os.pipe2 os.posix_fadvise
        os.posix_fallocate os.removexattr os.sched_getaffinity os.sched_setaffinity os.setxattr
        os.splice os.waitid os.O_DIRECT os.O_NOATIME os.O_PATH os.O_TMPFILE
        signal.SIGPOLL signal.SIGPWR signal.SIGRTMAX signal.SIGRTMIN signal.sigtimedwait
        signal.sigwaitinfo select.epoll time.CLOCK_BOOTTIME mmap.MADV_HUGEPAGE mmap.MAP_POPULATE
    """,
}
# Tests of the kernels, or that plant their fault in one, or that compile.
OF_KERNELS = (
    "ops/test_build.py", "ops/test_cuda_kernels.py", "ops/test_head.py", "ops/test_library.py",
    "ops/test_loss.py", "ops/test_native.py", "test_setup.py", "numbers/test_numerics.py",
    "users/test_building.py", "selftest/test_faults.py",
    "test_gpu_head.py::", "test_step.py::test_out_of_memory", "::test_broken_kernels",
    "::test_kernels_of_a_wrong_gradient",
    "::test_so_is_what_a_child_says",
)  # fmt: skip
LACKING = set(NO_NAME[SYSTEM].split())


# ---- what the package's modules import ----------------------------------------------------------


class Limited(ModuleType):
    """A module of Python's library without what the system lacks."""

    def __init__(self, real: ModuleType, instead: Mapping[str, Any]) -> None:
        super().__init__(real.__name__)
        self.__dict__.update(instead)
        self._real = real

    def __getattr__(self, name: str) -> Any:
        if f"{self.__name__}.{name}" in LACKING:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r} on {SYSTEM}")
        found = getattr(self._real, name)
        is_console = SYSTEM == "win32" and name in ("stdout", "stderr")
        return Console(found) if is_console and getattr(found, "encoding", "") == "utf-8" else found


class Console:
    """A stream that takes the characters of cp1252 alone."""

    encoding = "cp1252"

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        text.encode(self.encoding)
        return int(self._stream.write(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _context(method: str | None = None) -> Any:
    if method not in (None, "spawn"):
        raise ValueError(f"cannot find context for {method!r}")
    return multiprocessing.get_context("spawn")


class _Process(psutil.Process):
    """A process whose memory is told as Windows does."""

    def memory_info(self) -> Any:
        found = super().memory_info()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return SimpleNamespace(**found._asdict(), peak_wset=peak) if SYSTEM == "win32" else found


def _getrusage(who: int) -> Any:
    """In bytes, as macOS counts."""
    return SimpleNamespace(ru_maxrss=resource.getrusage(who).ru_maxrss * 1024)


INSTEAD: dict[str, dict[str, Any]] = {
    "sys": {"platform": SYSTEM},
    "psutil": {"Process": _Process},
    "resource": {"getrusage": _getrusage},
    "os": {"name": "nt" if SYSTEM == "win32" else "posix"},
    "multiprocessing": {"get_all_start_methods": lambda: ["spawn"], "get_context": _context}
    if SYSTEM == "win32"
    else {},
}
SEEN = {
    name: Limited(importlib.import_module(name), INSTEAD.get(name, {})) for name in LIMITED
}  # fmt: skip


def _import(
    name: str, globals: Any = None, locals: Any = None, fromlist: Sequence[str] = (), level: int = 0
) -> ModuleType:
    if level == 0 and name.partition(".")[0] in NO_MODULE[SYSTEM]:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return SEEN.get(name) or builtins.__import__(name, globals, locals, fromlist, level)


class Loader(importlib.machinery.SourceFileLoader):
    """Runs a module with an `import` of its own."""

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": _import}
        super().exec_module(module)


class Finder(importlib.abc.MetaPathFinder):
    """Finds the package's own Python modules."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname.partition(".")[0] != "rmipo_lite":
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and type(spec.loader) is importlib.machinery.SourceFileLoader:
            spec.loader = Loader(spec.loader.name, spec.loader.path)
        return spec


# ---- files as Windows has them ------------------------------------------------------------------


def is_open(path: Any) -> bool:
    """Whether this process has a file open, or a file below a folder: it can't be renamed."""
    links = []
    for handle in Path("/proc/self/fd").iterdir():
        try:
            links.append(os.readlink(handle))
        except OSError:  # the one that lists them
            continue
    return any(_is_within(link, path) for link in links)


def is_mapped(path: Any) -> bool:
    """Whether a file, or one below a folder, is memory: it can be renamed and nothing else."""
    text = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    mapped = {line.split(maxsplit=5)[-1] for line in text.splitlines()}
    return any(_is_within(name, path) for name in mapped)


def _is_within(name: str, path: Any) -> bool:
    wanted = os.path.realpath(path)
    return name == wanted or name.startswith(wanted + os.sep)


def _guarded(real: Callable[..., Any], name: str) -> Callable[..., Any]:
    moves = name in ("rename", "replace")

    def call(path: Any, *rest: Any, **options: Any) -> Any:
        names = [each for each in (path, *rest[:moves]) if isinstance(each, str | os.PathLike)]
        gone = names[moves:]  # what will be there no more: a target, or what is deleted
        if any(map(is_open, names)) or any(map(is_mapped, gone)):
            raise PermissionError(13, "it is open in a process", os.fspath(names[-1]))
        if name == "rename" and os.path.lexists(rest[0]) and os.fspath(rest[0]) != os.fspath(path):
            raise FileExistsError(17, "it exists", os.fspath(rest[0]))
        return real(path, *rest, **options)

    return call


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Put everything in place before a conftest imports the package."""
    if "rmipo_lite" in sys.modules:
        raise pytest.UsageError("tests.elsewhere came too late; give it with -p")
    sys.meta_path.insert(0, Finder())
    early_config.addinivalue_line(
        "filterwarnings", "ignore:rmipo_lite. plain PyTorch does the work"
    )
    if SYSTEM == "win32":
        shutil._use_fd_functions = False  # type: ignore[attr-defined]
        for name in ("rename", "replace", "unlink", "remove", "rmdir"):
            setattr(os, name, _guarded(getattr(os, name), name))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what tests the kernels themselves where there are none, and what compiles them."""
    skip = pytest.mark.skip(reason="no compiler, so no kernels, as if on Windows")
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        named = any(name in item.nodeid for name in OF_KERNELS)
        if SYSTEM == "win32" and (named or "native" in params.values()):
            item.add_marker(skip)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """Skip a test that asks for the kernels where there are none."""
    try:
        return (yield)
    except RuntimeError as error:
        if SYSTEM == "win32" and "the native extension for cpu is missing" in str(error):
            pytest.skip("it wants the kernels, and there is no compiler, as if on Windows")
        raise
