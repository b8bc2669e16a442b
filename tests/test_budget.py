from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rmipo_lite.budget import activation_bytes_per_token, resolve_token_budget
from rmipo_lite.config import RMiPOConfig
from tests.tiny import tiny_model


def test_a_number_is_taken_as_it_is(tmp_path: Path) -> None:
    args = RMiPOConfig(str(tmp_path), max_tokens_per_microstep=77)
    assert resolve_token_budget(tiny_model(), args) == 77


def test_auto_on_the_cpu(tmp_path: Path) -> None:
    assert resolve_token_budget(tiny_model(), RMiPOConfig(str(tmp_path), use_cpu=True)) == 4096


def test_activations_by_hand(tmp_path: Path) -> None:
    """2 layers of (16 * 32 + 5 * 48) floats of 4 bytes."""
    args = RMiPOConfig(str(tmp_path), use_cpu=True)
    assert activation_bytes_per_token(tiny_model(), args) == 2 * (16 * 32 + 5 * 48) * 4


@pytest.mark.cuda
def test_auto_on_a_gpu_stays_below_its_memory(tmp_path: Path) -> None:
    model, args = tiny_model().cuda(), RMiPOConfig(str(tmp_path))
    tokens = resolve_token_budget(model, args)
    free, _ = torch.cuda.mem_get_info()
    assert 512 <= tokens <= 32768
    assert tokens * activation_bytes_per_token(model, args) < free
