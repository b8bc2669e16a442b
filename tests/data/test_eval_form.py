"""An evaluation set is read in the form of the rows that are trained on, or that is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rmipo_lite import run
from rmipo_lite.config import RMiPOConfig
from rmipo_lite.data.rows import load_rows
from rmipo_lite.tokens.pair import TokenizedPair
from rmipo_lite.tokens.templates import prepare_tokenizer
from tests.kit import chat_row, text_row, tiny_model, word_tokenizer

_TEXT = text_row("w1 w2", "w3", "w4")


def _eval_pairs(folder: Path, train: dict[str, Any], held_out: Any) -> list[TokenizedPair]:
    tokenizer = prepare_tokenizer(word_tokenizer(), "plain")
    args = RMiPOConfig(str(folder), use_cpu=True)
    data = load_rows([train])
    _, pairs, _ = run._pairs(data, held_out, None, tokenizer, args, tiny_model())
    assert isinstance(pairs, list)
    return pairs


@pytest.mark.parametrize("held_out", [_TEXT, {**_TEXT, "system": None}])
def test_texts_are_messages_where_a_system_column_is_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], held_out: dict[str, Any]
) -> None:
    (found,) = _eval_pairs(tmp_path, {**_TEXT, "system": "w5"}, [held_out])
    assert "WARNING" not in capsys.readouterr().out
    (wanted,) = _eval_pairs(
        tmp_path, chat_row("w1 w2", "w3", "w4"), [chat_row("w1 w2", "w3", "w4")]
    )
    assert found == wanted


def test_two_forms_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat = chat_row("w1 w2", "w3", "w4")
    for train, held_out, said in (
        (chat, _TEXT, "eval_dataset are plain text, those trained on are messages"),
        (_TEXT, chat, "eval_dataset are messages, those trained on are plain text"),
    ):
        _eval_pairs(tmp_path, train, [held_out])
        warnings = [line for line in capsys.readouterr().out.splitlines() if "WARNING" in line]
        assert len(warnings) == 1
        assert said in warnings[0]
    _eval_pairs(tmp_path, chat, [chat])
    assert "WARNING" not in capsys.readouterr().out


def test_texts_become_messages_when_asked() -> None:
    rows, report = load_rows([_TEXT], as_messages=True)
    assert rows[0].prompt == [{"role": "user", "content": "w1 w2"}]
    assert rows[0].chosen == [{"role": "assistant", "content": "w3"}]
    assert not report.has_system
