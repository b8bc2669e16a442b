"""Hostile files: the cases hold, and find what is planted in the package."""

from __future__ import annotations

import html
import pickle
from pathlib import Path

import pytest

from rmipo_lite.data import files
from rmipo_lite.model import loading, names
from rmipo_lite.output import table
from tests.trials.data.hostile import CASES, Bomb

NAMES = list(CASES)


def test_the_bomb_goes_off(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()


def _nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "check_model_folder", lambda folder: None)


def _code_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_NO_CODE", {"trust_remote_code": True})


def _transformers_may_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_NO_CODE", {})


def _names_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "run_name", lambda model: f"rmipo-{names.name_of(model)}")


def _no_line_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_csv_lines", lambda text: text)


def _no_escaping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html, "escape", lambda text, quote=True: text)


def _terminal_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "printable", lambda text: text)


@pytest.mark.parametrize(
    ("plant", "case"),
    [
        (_nobody_looks, "a model whose weights are a bare pickle"),
        (_nobody_looks, "an adapter whose base is a pickle"),
        (_code_is_trusted, "a model with code"),
        (_transformers_may_ask, "a tokenizer with code"),
        (_names_as_they_are, "names of runs"),
        (_no_line_limit, "a CSV line without end"),
        (_no_escaping, "markup in data"),
        (_terminal_codes, "escape codes in data"),
    ],
)
def test_a_fault_is_found(plant, case: str, try_check, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    assert try_check(35, NAMES.index(case)).lost == 1
