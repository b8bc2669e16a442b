"""What a cached prior costs in gamma."""

from __future__ import annotations

from benchmarks import drift
from benchmarks.merge import short_rows
from rmipo_lite.demo.data import MODEL, PAIRS


def test_a_cached_prior_drifts_and_one_scored_at_every_step_does_not() -> None:
    rows = short_rows(PAIRS, 32)
    cached, live = (
        drift._distances(MODEL, rows, prior, rate=1e-2, steps=6, batch=4)
        for prior in ("cached", "refresh:1")
    )
    assert len(cached) == len(live) == 24
    assert max(live) < 1e-6
    assert max(cached[:4]) < 1e-6  # nothing has been trained yet
    assert max(cached[-4:]) > 1e-3
