"""Messages and progress: safe text, plain lines without a terminal, a bar in one, never a raise."""

from __future__ import annotations

import ast
import contextlib
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerCallback

from rmipo_lite.output.console import (
    duration,
    in_notebook,
    in_terminal,
    printable,
    say,
    show,
)  # fmt: skip
from rmipo_lite.watch.progress import ProgressDisplay, metric_line, show_progress
from scripts.architecture import PACKAGE
from tests.kit import make_trainer


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_control_characters_and_direction_marks_are_shown_not_sent() -> None:
    assert printable("a\x1b[2Jb\tc\nd\u202ee") == "a\\x1b[2Jb\tc\nd\\x202ee"


@pytest.mark.parametrize("stream", [None, "closed", "ascii", "broken"])
def test_say_never_raises(monkeypatch: pytest.MonkeyPatch, stream: str | None) -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    closed = io.StringIO()
    closed.close()
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    streams = {"closed": closed, "ascii": ascii_only, "broken": Broken(), None: None}
    monkeypatch.setattr(sys, "stdout", streams[stream])
    say("γ = 1.6")
    assert in_terminal() is False
    if stream == "ascii":
        assert ascii_only.buffer.getvalue() == b"? = 1.6\n"  # type: ignore[attr-defined]


def literals(path: Path) -> Iterator[str]:
    """The texts of a module that it may print: all but its docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docs = {ast.get_docstring(n, clean=False) for n in ast.walk(tree) if isinstance(n, documented)}
    for node in ast.walk(tree):
        value = node.value if isinstance(node, ast.Constant) else None
        if isinstance(value, str) and value not in docs:
            yield value


def test_a_windows_console_shows_every_text_of_the_package() -> None:
    # HTML; a byte order mark; ranges of characters
    unprinted = {"watch/panel.py", "data/cells.py", "inspection/near_duplicates.py"}
    unprinted.add("output/console.py")
    for path in sorted(set(PACKAGE.rglob("*.py")) - {PACKAGE / name for name in unprinted}):
        for text in literals(path):
            assert text.encode("cp1252", "replace").decode("cp1252") == text, path


def test_a_windows_console_shows_what_it_can_of_a_users_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    screen = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    screen.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("TERM", "xterm")
    display = ProgressDisplay(live=True)
    display.on_train_begin(None, SimpleNamespace(global_step=0, max_steps=1), None)  # type: ignore[arg-type]
    display._view.tell(display.run, "held out 日本 é")
    say("held out 日本 é")
    display.close()
    say("held out 日本 é")
    screen.flush()
    shown = screen.buffer.getvalue()  # type: ignore[attr-defined]
    assert shown.count("held out ?? é".encode("cp1252")) == 3


class Both:
    def __str__(self) -> str:
        return "as text"

    def _repr_html_(self) -> str:
        return "<b>as a table</b>"


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A kernel's surroundings; the list holds what was displayed."""
    shown: list[Any] = []
    shell = ModuleType("IPython")
    shell.get_ipython = lambda: SimpleNamespace(kernel=object())  # type: ignore[attr-defined]
    display = ModuleType("IPython.display")
    display.display = shown.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", shell)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return shown


Cell = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})


def test_a_notebook_shows_what_has_a_table_as_one(
    notebook: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", Cell())
    both = Both()
    assert in_notebook()
    show(both)
    assert notebook == [both]


def test_a_redirected_cell_is_no_notebook(
    notebook: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", Cell())
    with contextlib.redirect_stdout(io.StringIO()) as text:
        assert not in_notebook()
        show(Both())
    assert text.getvalue() == "as text\n"
    assert notebook == []


def test_a_terminal_of_ipython_is_no_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    shell = ModuleType("IPython")
    shell.get_ipython = lambda: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", shell)
    monkeypatch.setattr(sys, "stdout", Cell())
    assert not in_notebook()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (61, "1 min 01 s"), (7600, "2 h 06 min")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_metric_line_takes_what_is_there_in_a_fixed_order() -> None:
    logs = {"rewards/margins": 0.5, "loss": 1.25, "epoch": 1.0, "rmipo/gamma": 1.1}
    assert metric_line(logs) == "loss 1.2500  margin +0.500  gamma 1.10"


def _train(tmp_path: Path, **display: Any) -> None:
    trainer = make_trainer(tmp_path, max_steps=3, save_strategy="no", eval_strategy="steps",
                           eval_steps=2)  # fmt: skip
    show_progress(trainer, ProgressDisplay(**display))
    names = {type(c).__name__ for c in trainer.callback_handler.callbacks}
    assert not names & {"PrinterCallback", "ProgressCallback"}
    trainer.train()


def test_a_pipe_gets_plain_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _train(tmp_path, seconds=0.0)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 1/3, ")
    assert "left" in lines[0]
    assert any(line.startswith("step 2: held out  loss ") for line in lines)
    assert lines[-1].startswith("3 steps in ")
    assert not any("\x1b" in line or "\r" in line for line in lines)


def test_few_lines_when_steps_are_quick(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _train(tmp_path, seconds=60.0)
    assert len(capsys.readouterr().out.splitlines()) == 3  # two evaluations and the end


@pytest.mark.parametrize("term", ["xterm-256color", "dumb"])
def test_a_terminal_gets_a_bar_unless_it_is_dumb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, term: str
) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("TERM", term)
    _train(tmp_path, seconds=0.0)
    assert ("\x1b[" in screen.getvalue()) == (term != "dumb")
    assert "3/3" in screen.getvalue()


def test_the_bar_is_closed_when_training_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fail(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise RuntimeError("planted")

    monkeypatch.setattr(sys, "stdout", Terminal())
    trainer = make_trainer(tmp_path, save_strategy="no", callbacks=[Fail()])
    display = show_progress(trainer, ProgressDisplay(live=True))
    with pytest.raises(RuntimeError, match="planted"):
        trainer.train()
    assert display._view._progress is None  # type: ignore[attr-defined]


def test_markup_in_a_log_is_text(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("TERM", "xterm")
    display = ProgressDisplay(live=True)
    display.on_train_begin(None, SimpleNamespace(global_step=0, max_steps=1), None)  # type: ignore[arg-type]
    display._view.tell(display.run, "[red]row[/red]")
    display.close()
    assert "[red]row[/red]" in screen.getvalue()
