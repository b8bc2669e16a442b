"""Folders that are whole or not there, and what is read of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rmipo_lite.checkpoints import sealed_folder
from rmipo_lite.checkpoints.state import load_state, save_state


def test_a_state_holds_no_file_mapped(tmp_path: Path) -> None:
    """Windows deletes none that is, and the optimizer keeps what it is given."""
    save_state(tmp_path, "optimizer", {"step": torch.tensor(3.0), "moment": torch.ones(4)})
    state = load_state(tmp_path, "optimizer")
    assert [state[name].untyped_storage().filename for name in ("step", "moment")] == [None, None]
    assert state["moment"].tolist() == [1, 1, 1, 1]


def test_a_checkpoint_that_cannot_be_deleted_keeps_no_other_from_going(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2, 3):
        with sealed_folder.staged_checkpoint(
            tmp_path / f"checkpoint-{step}", step=step, run_id="a"
        ) as folder:
            (folder / "weights").write_bytes(b"w")
    real = sealed_folder.move

    def move(source: Path, target: Path) -> None:
        if source.name == "checkpoint-1":
            raise PermissionError(13, "it is open in a process")
        real(source, target)

    monkeypatch.setattr(sealed_folder, "move", move)
    newest = tmp_path / "checkpoint-3"
    gone = sealed_folder.rotate(tmp_path, run_id="a", limit=1, keep={newest})
    assert [path.name for path in gone] == ["checkpoint-2"]
    assert [path.name for path in sealed_folder.checkpoints(tmp_path)] == [
        "checkpoint-1", "checkpoint-3",
    ]  # fmt: skip
    assert "checkpoint-1 could not be deleted" in capsys.readouterr().out
