"""What a difference is worth: right as often as it says, over pairs and over seeds."""

from __future__ import annotations

import math
import random
import statistics
from pathlib import Path

import pytest

from rmipo_lite.comparing.outcome import RunOutcome
from rmipo_lite.comparing.worth import difference, estimated


def _run(method: str, seed: int, values: list[float]) -> RunOutcome:
    cases = {str(place): value for place, value in enumerate(values)}
    return RunOutcome(method, seed, Path(method), cases={"accuracy": cases})


def test_means_and_errors() -> None:
    runs = [_run("a", 0, [1.0, 0.0] * 10), _run("a", 1, [1.0, 1.0, 0.0, 1.0] * 5)]
    assert estimated(runs, "accuracy").mean == pytest.approx(0.625)
    cases = [(a + b) / 2 for a, b in zip([1.0, 0.0] * 10, [1.0, 1.0, 0.0, 1.0] * 5, strict=True)]
    of_cases = statistics.stdev(cases) / math.sqrt(20)
    assert estimated(runs, "accuracy").error == pytest.approx(math.hypot(0.125, of_cases))
    one = estimated(runs[:1], "accuracy")
    assert one.error == pytest.approx(math.sqrt(20 * 0.25 / 19 / 20))  # of its pairs
    assert all(map(math.isnan, estimated([], "accuracy")))
    assert math.isnan(estimated(runs, "win_rate").mean)


def test_a_difference_is_paired() -> None:
    """What both find hard is no difference; where it is the same everywhere it is sure."""
    hard = [float(i % 3 == 0) for i in range(30)]
    one, other = [_run("a", 0, [v + 0.1 for v in hard])], [_run("b", 0, hard)]
    found = difference(one, other, "accuracy")
    assert found.mean == pytest.approx(0.1)
    assert found.error == pytest.approx(0.0, abs=1e-12)
    assert found.is_sure
    assert not difference(one, one, "accuracy").is_sure
    few = [_run("a", 0, hard[:7])]
    assert math.isnan(difference(few, other, "accuracy").mean)  # too few pairs
    assert math.isnan(difference(one, [_run("b", 1, hard)], "accuracy").mean)  # no seed shared


def test_no_difference_is_shown_as_seldom_as_said() -> None:
    """Of methods that differ by luck alone, of pairs and of seeds, five in a hundred at most."""
    draw = random.Random(0)

    def runs(method: str, hardness: list[float], seeds: int) -> list[RunOutcome]:
        return [
            _run(method, seed, [h + luck + draw.gauss(0, 0.3) for h in hardness])
            for seed in range(seeds)
            for luck in (draw.gauss(0, 0.1),)
        ]

    shown = 0
    for _ in range(300):
        hardness = [draw.random() for _ in range(40)]
        a, b = (runs(name, hardness, 3) for name in "ab")
        shown += difference(a, b, "accuracy").is_sure
    assert shown <= 30  # three seeds tell a spread poorly: 7 to 10 %
    # By the pairs alone it would be far more.
    naive = 0
    for _ in range(300):
        hardness = [draw.random() for _ in range(40)]
        a, b = (runs(name, hardness, 1) for name in "ab")
        naive += difference(a, b, "accuracy").is_sure
    assert naive > shown
