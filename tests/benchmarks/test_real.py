"""Which pairs the real model's benchmark draws; its contenders are the other benchmarks'."""

from __future__ import annotations

from benchmarks import real
from rmipo_lite.demo.data import MODEL, PAIRS


def test_pairs_are_of_the_lengths_that_are_named() -> None:
    case = real.Lengths("24 to 40 tokens", 24, 40, 3)
    draws = real._draws(MODEL, PAIRS, case, rounds=4)
    assert [len(drawn) for drawn in draws] == [3] * 4
    rows = [pair.row for drawn in draws for pair in drawn]
    assert len(set(rows)) == len(rows)
    for drawn in draws:
        for pair in drawn:
            sides = [
                len(pair.prompt_ids) + len(ids) for ids in (pair.chosen_ids, pair.rejected_ids)
            ]
            assert min(sides) >= 24
            assert max(sides) < 40
    assert real._draws(MODEL, PAIRS, case, rounds=4) == draws
