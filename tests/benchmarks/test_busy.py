"""What a busy neighbour costs."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

from benchmarks import busy


def test_each_work_alone_and_beside_a_neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds are interleaved; the neighbour is there for half of them, and gone afterwards."""
    neighbours: list[Any] = []
    real, asked = subprocess.Popen, []

    def begun(*arguments: Any) -> Any:
        neighbours.append(real(*arguments))
        return neighbours[-1]

    def ask(module: str, question: object, what: str, *_: object) -> dict[str, list[float]]:
        is_busy = bool(neighbours) and neighbours[-1].poll() is None
        asked.append((what, is_busy))
        return {work: [3.0 if is_busy else 2.0, 1.0] for work in busy.TIMES}

    monkeypatch.setattr(subprocess, "Popen", begun)
    monkeypatch.setattr(busy, "ask", ask)
    names = ("two threads", "one thread")
    rows = list(busy.bench(2, {name: busy.THREADS[name] for name in names}))
    assert asked == [(name, b) for name in names for b in (False, True)] * 2
    assert all(neighbour.poll() is not None for neighbour in neighbours)
    over = [row.value for row in rows if row.metric == "CPU time, busy over quiet"]
    assert over == [1.5] * len(names) * len(busy.TIMES)
