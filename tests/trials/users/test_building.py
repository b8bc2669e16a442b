"""Building under obstacles and races, forked workers: they hold, and a hang or crash is seen."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.trials.scorecard import Lost
from tests.trials.users import building, forks


@pytest.mark.slow
def test_an_obstacle_that_is_none_is_found(try_check, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernels load after all, there is no line and another kind."""
    text, _, kind, words = building.OBSTACLES[0]
    always = {"RMIPO_LITE_CACHE": os.environ.get("RMIPO_LITE_CACHE")}
    monkeypatch.setattr(building, "OBSTACLES", [(text, lambda folder: always, kind, words)])
    assert try_check(17, 0).lost == 1


def test_obstacles_leave_what_they_say(tmp_path: Path) -> None:
    for place, (text, scene, *_) in enumerate(building.OBSTACLES):
        folder = tmp_path / str(place)
        folder.mkdir()
        changes = scene(folder)
        if "foreign" in text or "symbol" in text:
            library = building.cached_at(folder / "cache")
            assert library.is_file()
            assert building.library._matches(library)
        if "no compiler" in text:
            assert os.listdir(str(changes["PATH"])) == []


@pytest.mark.slow
def test_two_builders_are_found(tmp_path: Path, try_check, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each child with a cache of its own: two builds where one was wanted."""
    monkeypatch.setattr(building, "BUILDERS", 2)
    real = building.start

    def start(job, cache, *, output):
        return real(job, f"{cache}-{output.name}", output=output)

    monkeypatch.setattr(building, "start", start)
    outcome = try_check(18, 0)
    assert outcome.lost == 1
    assert "['built'], ['built']" in str(outcome.losses)


def hangs(kind: str, impl: str) -> None:
    if os.fork() == 0:
        time.sleep(600)
    time.sleep(600)


def test_a_hung_worker_is_found_and_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forks, "parent_with_workers", hangs)
    started = time.monotonic()
    with pytest.raises(Lost, match="hung for more than 2 s"):
        forks.expect_no_hang("fork", "auto", 2.0)
    assert time.monotonic() - started < 300
