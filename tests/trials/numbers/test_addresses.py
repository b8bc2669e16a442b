"""Long addresses, tried on the CPU: the check holds, and finds what is planted."""

from __future__ import annotations

import random

import pytest
import torch

from rmipo_lite.ops import library, native
from tests.trials.numbers import addresses
from tests.trials.scorecard import Lost


@pytest.fixture(autouse=True)
def _kernels() -> None:
    if not library.status("cpu").available:
        pytest.skip(f"no kernels on the CPU: {library.status('cpu').reason}")


def test_addresses(try_check) -> None:
    if addresses.no_bindings():
        pytest.skip(str(addresses.no_bindings()))
    assert [(loss.tried, loss.message) for loss in try_check(41, 0, 7).losses] == []


def test_rows_of_32_bit_offsets_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = native.row_logps

    def row_logps(logits, *rest):
        wrapped = [row * logits.stride(0) % 2**31 // logits.stride(0) for row in range(3)]
        return real(logits[torch.tensor(wrapped)], *rest[:-1], None)

    addresses.rows_apart(torch.empty(3000), 1000, 1000, random.Random(0))
    far = 2**30
    monkeypatch.setattr(native, "row_logps", row_logps)
    with pytest.raises(Lost):
        addresses.rows_apart(addresses._memory(2 * far + 1000), far, 1000, random.Random(0))


def test_one_call_over_all_rows() -> None:
    addresses.dense_rows("cpu", 100, 333, random.Random(1))
