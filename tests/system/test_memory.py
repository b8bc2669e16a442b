"""What a process holds, its peak, and its limits."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rmipo_lite.planning.device import PeakMemory
from rmipo_lite.system import memory

CPU = torch.device("cpu")


def test_the_peak_is_that_of_the_work_watched() -> None:
    torch.ones(2**26)  # 256 MiB, given back before
    watched = PeakMemory(CPU)
    block = torch.ones(2**24)  # 64 MiB
    del block
    growth = watched.growth()
    if not memory.reset_peak():
        assert growth is None  # a larger one before hides it
        return
    assert growth is not None
    # Pages that the process had already count in neither; other threads may take some.
    assert 2**24 < growth < 2**27


def test_without_a_reset_a_peak_counts_only_where_it_is_the_largest_so_far(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "reset_peak", lambda: False)
    peaks = iter([500, 500, 700])
    monkeypatch.setattr(memory, "lifetime_peak", lambda: next(peaks))
    monkeypatch.setattr(memory, "held_bytes", lambda: 400)
    watched = PeakMemory(CPU)
    assert watched.growth() is None
    assert watched.growth() == 300


def test_a_container_gives_up_its_cached_files(tmp_path: Path) -> None:
    assert memory.left_in_container(tmp_path) is None
    (tmp_path / "memory.max").write_text("32000\n", encoding="ascii")
    (tmp_path / "memory.current").write_text("30000\n", encoding="ascii")
    (tmp_path / "memory.stat").write_text(
        "anon 6000\nfile 24000\nfile_mapped 7\n", encoding="ascii"
    )
    assert memory.left_in_container(tmp_path) == 26000
    (tmp_path / "memory.max").write_text("max\n", encoding="ascii")
    assert memory.left_in_container(tmp_path) is None


def test_a_block_has_its_limit_and_nothing_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "sys", SimpleNamespace(platform="darwin"))
    with memory.limit(2**20):
        bytearray(2**26)  # nothing is limited there
    if memory.CAN_LIMIT:
        monkeypatch.undo()
        with memory.limit(2**20), pytest.raises(MemoryError):
            bytearray(2**28)
        bytearray(2**28)
