"""Surroundings and memory after train(): the checks hold, and find what is left behind."""

from __future__ import annotations

import os
from contextlib import nullcontext

import pytest

from rmipo_lite import run
from rmipo_lite.training import restore


@pytest.mark.parametrize(
    ("fault", "index", "message"),
    [
        ("_drop_hooks", 3, "model"),
        pytest.param("kept_random_state", 0, "random", marks=pytest.mark.slow),
        pytest.param("_restore_environment", 0, "environment", marks=pytest.mark.slow),
        ("_restore_modules", 2, "model"),
    ],
)
def test_what_is_not_put_back_is_lost(
    fault: str, index: int, message: str, try_check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restore, fault, lambda *_: nullcontext())
    monkeypatch.setenv("RMIPO_LITE_TEST", "before")
    real = run.show_progress

    def changing(trainer) -> None:
        os.environ["RMIPO_LITE_TEST"] = "changed by the run"
        real(trainer)

    monkeypatch.setattr(run, "show_progress", changing)
    losses = try_check(27, index).losses
    assert len(losses) == 1
    assert message in losses[0].message


@pytest.mark.slow
def test_frames_that_are_kept_are_lost(try_check, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    monkeypatch.setattr(restore, "clear_frames", kept.append)
    assert "live tensors" in try_check(28, 2).losses[0].message
