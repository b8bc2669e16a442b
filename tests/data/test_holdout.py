"""Pairs put aside for evaluation, and how many of them a run evaluates."""

from __future__ import annotations

import pytest

from rmipo_lite.data.holdout import evaluated_part, split_holdout
from rmipo_lite.data.rows import Row


def test_holdout_shares_no_prompt_and_repeats() -> None:
    rows = [Row(i, f"p{i % 30}", "a", "b") for i in range(100)]
    train, held = split_holdout(rows, share=0.1, seed=3)
    assert len(train) + len(held) == 100
    assert 8 <= len(held) <= 10  # 3 or 4 pairs a prompt: ten is not always met exactly
    assert not {row.prompt for row in train} & {row.prompt for row in held}
    assert (train, held) == split_holdout(rows, share=0.1, seed=3)
    assert held != split_holdout(rows, share=0.1, seed=4)[1]
    assert [row.index for row in train] == sorted(row.index for row in train)


def test_holdout_bounds() -> None:
    rows = [Row(i, f"p{i}", "a", "b") for i in range(1000)]
    assert len(split_holdout(rows, share=0.5, at_most=200)[1]) == 200
    assert len(split_holdout(rows[:8])[1]) == 1
    assert split_holdout(rows[:7]) == (rows[:7], [])
    one_prompt = [Row(i, "p", "a", "b") for i in range(20)]
    assert split_holdout(one_prompt) == (one_prompt, [])
    with pytest.raises(ValueError, match="share"):
        split_holdout(rows, share=1.0)


def test_a_short_run_evaluates_what_takes_a_tenth_of_it() -> None:
    rows = [Row(i, f"p{i}", "a", "b") for i in range(200)]
    short = evaluated_part(rows, trained=110, seed=3)
    assert len(short) == 20  # forward alone is some half of a trained pair's time
    assert [row.index for row in short] == sorted(row.index for row in short)
    assert max(row.index for row in short) > 100  # drawn, not the first ones
    longer = evaluated_part(rows, trained=220, seed=3)
    assert len(longer) == 40
    assert {row.index for row in short} < {row.index for row in longer}
    assert evaluated_part(rows, trained=10_000) == rows
    assert len(evaluated_part(rows, trained=1)) == 8
    assert evaluated_part([], trained=100) == []
