"""Finding, building and loading the kernels where something is in the way of it.

Whatever it is: the package imports, trains, says one line, and never waits for a dead process.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sysconfig
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from rmipo_lite.ops import build, library
from tests.trials.runs.children import Child, fresh, start
from tests.trials.scorecard import Check, Trial, Trials, expect

_PATIENCE_S = 600.0  # whoever waits longer for a build hangs, however busy the machine is
_TELLING = "rmipo_lite: "  # what the package's own lines and warnings begin with


def no_compiler_here() -> str | None:
    """Why nothing can be built on this machine, or None."""
    try:
        build.compiler()
        build.ninja_path()
        build.source_dir()
    except build.BuildError as error:
        return str(error)
    return None


# ---- what can be in the way -------------------------------------------------------------------

Scene = Callable[[Path], dict[str, str | None]]  # an empty folder -> changes of the environment


def obstacles(trials: Trials) -> None:
    """Check 17: a fresh process that imports the package and trains, for each obstacle."""
    for trial in trials:
        with trial:
            trial.tried, scene, kind, words = OBSTACLES[trial.index]
            run = trial.folder / "run"
            env = {
                "RMIPO_LITE_CACHE": str(trial.folder / "cache"),
                "CXX": None,
                **scene(trial.folder),
            }
            done = fresh(train_once, str(run), env=env, stderr=subprocess.STDOUT,
                         stdout=subprocess.PIPE, capture_output=False)  # fmt: skip
            text = done.stdout
            expect(done.returncode == 0, f"exit {done.returncode}: {text[-300:]}")
            expect("Traceback" not in text, f"a traceback: {text[-300:]}")
            told = [line for line in text.splitlines() if _TELLING in line]
            # One line: that it compiles, or why it can't; both only where a compiler failed.
            tries = [line for line in told if _COMPILING in line]
            tried = kind == "built" or words == _FAILED
            expect(len(tries) == tried, f"said that it compiles: {told}")
            expect(len(told) == 1 + (words == _FAILED), f"{len(told)} lines and not one: {told}")
            expect(words in told[-1], f"the line is {told[-1]!r}, without {words!r}")
            outcome = json.loads(text.splitlines()[-1])
            expect(outcome["kind"] == kind, f"kernels: {outcome['kind']}, not {kind}")
            expect(all(map(math.isfinite, outcome["losses"])), f"losses {outcome['losses']}")


def train_once(folder: str) -> None:
    """In the child: two steps, then where the kernels came from and the losses, as JSON."""
    from tests.kit import logged_losses, tiny_trainer

    library._PACKAGE = Path(folder)  # no library beside the package
    if os.environ.get(_HIDE_NINJA):
        sysconfig.get_path = lambda *_: folder
    trainer = tiny_trainer(Path(folder), max_steps=2)
    trainer.train()
    found = library.status("cpu")
    losses = logged_losses(trainer)
    print(json.dumps({"kind": found.kind, "reason": found.reason, "losses": losses}))  # noqa: T201


_HIDE_NINJA = "RMIPO_LITE_SELFTEST_HIDE_NINJA"


def _nothing_on_path(folder: Path) -> dict[str, str | None]:
    (folder / "bin").mkdir()
    return {"PATH": str(folder / "bin")}


def _no_ninja(folder: Path) -> dict[str, str | None]:
    changes = _nothing_on_path(folder)
    name = build.compiler()[0]
    (folder / "bin" / "g++").symlink_to(str(shutil.which(name)))
    return {**changes, _HIDE_NINJA: "1"}


def _under_a_file(variable: str) -> Scene:
    """A folder that can't be made, even by root: its parent is a file."""

    def scene(folder: Path) -> dict[str, str | None]:
        (folder / "file").write_text("not a folder")
        changes: dict[str, str | None] = {variable: str(folder / "file" / "inside")}
        return changes if variable == "RMIPO_LITE_CACHE" else {"RMIPO_LITE_CACHE": None, **changes}

    return scene


def _odd_path(folder: Path) -> dict[str, str | None]:
    return {"RMIPO_LITE_CACHE": str(folder / "a b" / "ü$(x)'ß")}


def cached_at(cache: Path) -> Path:
    """Where that cache has, or would have, the library."""
    with patch.dict(os.environ, {"RMIPO_LITE_CACHE": str(cache)}):
        return library.cached_library("cpu")


def _in_cache(make: Callable[[Path], None], *, record: bool = True, compiler: bool = True) -> Scene:
    """A library that is not ours at ours' place, with a record that fits it or with garbage."""

    def scene(folder: Path) -> dict[str, str | None]:
        library = cached_at(folder / "cache")
        library.parent.mkdir(parents=True)
        make(library)
        if record:
            build.write_record(library, build.source_hash())
        else:
            library.with_suffix(".sha256").write_bytes(b"\xff\xfe\x00" * 40)
        return {} if compiler else _nothing_on_path(folder)

    return scene


def _compiled(code: str) -> Callable[[Path], None]:
    def make(library: Path) -> None:
        source = library.with_suffix(".cpp")
        source.write_text(code)
        command = [*build.compiler(), "-shared", "-fPIC", "-o", str(library), str(source)]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        source.unlink()

    return make


def _half(library: Path) -> None:
    library.write_bytes(b"\x7fELF" + bytes(range(256)) * 20)


def _of_another_torch(folder: Path) -> dict[str, str | None]:
    """A cache that an upgrade of torch left behind, with a library that would not load here."""
    with patch.object(torch, "__version__", "2.0.0"):
        _in_cache(_half)(folder)
    return {}


_FOREIGN = 'extern "C" int nothing_of_ours() { return 1; }'
_MISSING_SYMBOL = 'extern "C" void of_another_torch(); void* kept = (void*)&of_another_torch;'
_COMPILING = "compiling the cpu kernels, once"
_FAILED = "the compilation failed"
_NO_COMPILER = "no C++ compiler (g++) was found"
# What is in the way, how it is made, where the kernels come from then, what the one line says.
# The first and the seventh, which the default run takes, compile nothing.
OBSTACLES: list[tuple[str, Scene, str | None, str]] = [
    ("no kernel and no compiler", _nothing_on_path, None, _NO_COMPILER),
    ("a symbol that is missing", _in_cache(_compiled(_MISSING_SYMBOL)), "built", _COMPILING),
    ("half a library, no compiler", _in_cache(_half, compiler=False), None, _NO_COMPILER),
    ("a foreign library with its hash", _in_cache(_compiled(_FOREIGN)), "built", _COMPILING),
    ("a compiler that isn't there", lambda _: {"CXX": "no-such"}, None, "'no-such' of $CXX"),
    ("no ninja", _no_ninja, None, "no ninja was found"),
    (
        "a foreign library, no compiler",
        _in_cache(_compiled(_FOREIGN), compiler=False),
        None,
        _NO_COMPILER,
    ),
    ("a cache that can't be made", _under_a_file("RMIPO_LITE_CACHE"), None, "Not a directory"),
    ("a home that can't be written", _under_a_file("HOME"), None, "Not a directory"),
    ("blanks, umlauts and quotes in the path", _odd_path, "built", _COMPILING),
    ("the cache of another torch", _of_another_torch, "built", _COMPILING),
    (
        "a record that is garbage, a compiler that fails",
        lambda folder: _in_cache(_half, record=False)(folder) | {"CXX": "false"},
        None,
        _FAILED,
    ),
]


# ---- eight at once ----------------------------------------------------------------------------


BUILDERS = 8
_BEFORE = ("nothing", "builder killed", "builder and compiler killed", "locks left")


def build_race(trials: Trials) -> None:
    """Check 18: eight processes on an empty cache, after a builder was killed or was not."""
    for trial in trials:
        with trial:
            kind = _BEFORE[trial.index % len(_BEFORE)]
            trial.tried = kind
            cache = trial.folder / "a b" / "ü"  # a blank and an umlaut
            if kind == "locks left":
                _leave_locks(cache)
            elif kind != "nothing":
                moment = trial.rng.uniform(0.0, 3.0)
                # On a fast machine it may have ended before: again, and earlier.
                while not _builder_was_killed(trial, cache, moment, kind != "builder killed"):
                    shutil.rmtree(cache)
                    moment /= 2
                trial.tried = f"{kind} after {moment:.2f} s"
            _expect_one_build(trial, cache)


def _expect_one_build(trial: Trial, cache: Path) -> None:
    children = [
        start(build_here, str(cache), output=trial.folder / f"child-{place}")
        for place in range(BUILDERS)
    ]
    deadline = time.monotonic() + _PATIENCE_S
    hung = [child for child in children if not _ended(child, deadline)]
    expect(not hung, f"{len(hung)} of {BUILDERS} hung for more than {_PATIENCE_S:g} s")
    told = [child.text() for child in children]
    kinds = [re.findall(r"^kind (\w+)$", text, re.MULTILINE) for text in told]
    expect(
        sorted(kinds) == [["built"]] + [["cached"]] * (BUILDERS - 1), f"{kinds}; {told[0][-200:]}"
    )
    libraries = list(cache.rglob("*.so"))
    expect(len(libraries) == 1, f"{len(libraries)} libraries")
    left = [path.name for path in cache.iterdir() if path.name.startswith("build-")]
    expect(not left, f"folders of builds are left: {left}")
    expect(cache.stat().st_mode & 0o777 == 0o700, "others may read or write the cache")


def _ended(child: Child, deadline: float) -> bool:
    try:
        child.wait(max(0.1, deadline - time.monotonic()))
    except TimeoutError:
        return False
    return True


def build_here(cache: str) -> None:
    """In a child: have the kernels, and say where they came from."""
    os.setsid()  # a group of its own, to be killed with its compiler
    os.environ["RMIPO_LITE_CACHE"] = cache
    library._PACKAGE = Path(cache)  # no library beside the package
    library._statuses.clear()
    flags = build.compile_flags
    # What is tried is who builds; code of any speed will do.
    quick: Callable[[str], Mapping[str, Any]] = lambda kind: {  # noqa: E731
        name: [*values, "-O0"] for name, values in flags(kind).items()
    }
    with patch.object(build, "compile_flags", quick):
        print("kind", library.status("cpu").kind, flush=True)  # noqa: T201


def _builder_was_killed(trial: Trial, cache: Path, moment: float, with_compiler: bool) -> bool:
    """Start to build, kill that after so many seconds; False where it had ended."""
    child = start(build_here, str(cache), output=trial.folder / f"killed-{moment}")
    child.wait_for("compiling")
    time.sleep(moment)
    if with_compiler and child.running:
        os.killpg(child.pid, signal.SIGKILL)
    child.send(signal.SIGKILL)
    child.wait()
    return "kind" not in child.text()


def _leave_locks(cache: Path) -> None:
    """What killed processes leave: torch's own lock, ours without a holder, half a build."""
    library = cached_at(cache)
    key = library.parent.name
    cache.mkdir(mode=0o700, parents=True)
    half = cache / f"build-{key}-killed"
    for folder in (cache, library.parent, half):
        folder.mkdir(exist_ok=True)
        (folder / "lock").touch()
    (cache / f"{key}.lock").touch()
    (half / "blocks.o").write_bytes(b"half")


CHECKS = [
    Check(17, "kernels missing, foreign, corrupt; no compiler, no cache", len(OBSTACLES), obstacles,
          absent=no_compiler_here),
    Check(18, "eight builders at once, killed builders, stale locks", 20, build_race,
          absent=no_compiler_here),
]  # fmt: skip
