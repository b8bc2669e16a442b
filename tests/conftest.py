"""What every test shares: where the shared data lies, seeds, and skipping without a GPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
REFERENCES = Path(__file__).resolve().parent / "references"

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches a hub
# On tensors this small a second thread costs more than it gives, and far more on a busy machine.
# Tests of threading set their own number.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models, tokenizers and data beside the project; skips where absent."""
    if not SHARED.is_dir():
        pytest.skip("../shared (real data and models) is not on this machine")
    return SHARED


@pytest.fixture(scope="session")
def references() -> Path:
    return REFERENCES


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="CUDA test: no NVIDIA GPU on this machine")
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(skip)
