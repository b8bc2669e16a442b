"""Terminals, secrets: the checks hold, and each finds the fault it is there for."""

from __future__ import annotations

import pytest

from rmipo_lite.checkpoints import weights


@pytest.mark.slow
def test_a_secret_in_a_file_is_lost(try_check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "redact", lambda content: content)
    assert "training_config.json" in try_check(36, 0).losses[0].message
