"""Kills, damage, Ctrl-C, full disks: the checks hold, and each finds the fault it is there for."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rmipo_lite.checkpoints import sealed_folder, trainer_mixin
from tests.trials.runs import survival


@pytest.mark.slow
def test_a_checkpoint_that_is_not_verified_is_lost(
    try_check, monkeypatch: pytest.MonkeyPatch
) -> None:
    def newest(folder: Path):
        return sealed_folder.checkpoints(folder)[-1], []

    monkeypatch.setattr(survival, "newest_valid_checkpoint", newest)
    assert try_check(7, 1, 2, 4).lost == 3


@pytest.mark.slow
def test_a_save_that_ends_the_run_is_lost(try_check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        trainer_mixin.SafeCheckpointing, "_save_checkpoint",
        lambda self, model, trial: self._write_checkpoint(trial),
    )  # fmt: skip
    assert try_check(14, 0, 1).lost == 2


@pytest.mark.slow
def test_a_save_in_place_is_lost(try_check, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written into the predecessor's own folder, a failed save takes it along."""
    real = sealed_folder.staged_checkpoint

    def in_place(target: Path, **options):
        for earlier in target.parent.glob("checkpoint-2"):
            shutil.rmtree(earlier)
        return real(target, **options)

    monkeypatch.setattr(trainer_mixin, "staged_checkpoint", in_place)
    assert try_check(14, 1).lost == 1
