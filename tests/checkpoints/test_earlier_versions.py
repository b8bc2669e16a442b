"""Checkpoints of earlier versions go on: tests/references/checkpoints/<version>."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import REFERENCES
from tests.kit import tiny_trainer, trained_weights

VERSIONS = sorted((REFERENCES / "checkpoints").iterdir())


@pytest.mark.parametrize("version", VERSIONS, ids=lambda folder: folder.name)
def test_a_checkpoint_of_an_earlier_version_goes_on(version: Path, tmp_path: Path) -> None:
    """To the weights that version itself had at the end, cached priors and all."""
    shutil.copytree(version / "checkpoint-2", tmp_path / "checkpoint-2")
    trainer = tiny_trainer(
        tmp_path, count=8, max_steps=4, save_strategy="steps", save_steps=2, prior="cached"
    )
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    wanted, got = load_file(version / "after.safetensors"), trained_weights(trainer)
    assert wanted.keys() == got.keys()
    for name, weight in wanted.items():
        torch.testing.assert_close(got[name], weight, atol=1e-5, rtol=0)
