"""A conversation typed into a terminal: words as they come, before and after, and the ways out."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest

import rmipo_lite
from rmipo_lite import demo
from rmipo_lite.cli import chat
from rmipo_lite.cli.main import main


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return rmipo_lite.train(
        str(demo.MODEL), demo.load_rows()[:64], learning_rate=1e-2, max_steps=6, use_cpu=True,
        output_dir=tmp_path_factory.mktemp("run") / "out", eval_completions=0, sample_prompts=0,
        per_device_train_batch_size=8,
    )  # fmt: skip


def _typed(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))


def test_answers_stream_and_enter_alone_shows_the_model_before(
    run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = "Tell me what a dog is."
    _typed(monkeypatch, "", asked, "", "/new", asked, "/what", "/quit", "never read")
    assert main(["chat", str(run.output_dir), "--use_cpu", "--max_new_tokens", "24"]) == 0
    found = run.compare([asked], max_new_tokens=24)
    lines = capsys.readouterr().out.splitlines()
    start = lines.index(chat.HELP)
    after, before = ([text] if text.ended else [text, "(cut at its longest)"]
                     for text in (found.after[0], found.before[0]))  # fmt: skip
    assert lines[start + 1 :] == [
        "(before training)", "(nothing was said yet)", *after, "(before training)", *before,
        "(a new conversation)", *after, chat.HELP,
    ]  # fmt: skip


def test_a_model_without_a_before_says_so_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _typed(monkeypatch, "What is 2 + 2?", "", "What is 2 + 3?")
    assert main(["chat", str(demo.MODEL), "--use_cpu", "--max_new_tokens", "4"]) == 0
    out = capsys.readouterr().out
    assert "before/after needs an adapter" in out
    assert out.count("(cut at its longest)") == 2


def test_ctrl_c_stops_an_answer_and_no_more(
    run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = chat.Words.on_finalized_text
    pressed: list[str] = []

    def press(self: Any, text: str, stream_end: bool = False) -> None:
        whole(self, text, stream_end)
        if not pressed:
            pressed.append(text)
            raise KeyboardInterrupt

    monkeypatch.setattr(chat.Words, "on_finalized_text", press)
    _typed(monkeypatch, "What is 2 + 2?", "What is 2 + 2?")
    chat.talk(run, None, {"max_new_tokens": 16})
    out = capsys.readouterr().out
    assert "(stopped; this turn is forgotten)" in out
    assert out.rstrip().endswith(run.generate(["What is 2 + 2?"], 16)[0])


def test_nothing_that_a_terminal_would_execute_is_written(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = chat.Words(SimpleNamespace())
    words.on_finalized_text("red \x1b[31m")
    words.on_finalized_text("\x07", stream_end=True)
    assert capsys.readouterr().out == "red \\x1b[31m\\x07\n"


def test_a_model_without_a_template_is_refused(
    run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    run.save(tmp_path / "bare")
    (tmp_path / "bare" / "chat_template.jinja").unlink()
    _typed(monkeypatch, "Hello")
    assert main(["chat", str(tmp_path / "bare"), "--use_cpu"]) == 1
    assert "chat needs a tokenizer with a chat template" in capsys.readouterr().err
