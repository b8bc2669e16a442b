"""What verdicts are worth: counts, rate, interval, lengths, and the pairs to read."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from rmipo_lite.judging.judgement import Judged, Judgement
from rmipo_lite.model.generation import Answer
from rmipo_lite.output.uncertainty import bootstrap, wilson


def _judged(*wins: float) -> Judgement:
    pairs = [Judged(f"p{i}", Answer("a b"), Answer("c"), won) for i, won in enumerate(wins)]
    return Judgement.of(pairs, "the model at step 0", [(2, 1)] * (len(wins) - 1) + [(1, 1)])


def test_ties_are_halves_and_what_has_no_verdict_is_counted_apart() -> None:
    found = _judged(1.0, 1.0, 0.5, 0.0, math.nan)
    assert found.counts() == {"won": 2, "tied": 1, "lost": 1, "no verdict": 1}
    assert found.win_rate == pytest.approx(2.5 / 4)
    assert found.interval == bootstrap([1.0, 1.0, 0.5, 0.0])
    assert found.tokens == (pytest.approx(9 / 5), 1.0)
    assert found.longer == 1.0  # of the four that differ
    text = str(found)
    assert "2 won, 1 tied, 1 lost; 1 without a verdict; win rate 62%" in text
    assert "2 against 1 tokens, longer in 100%" in text


def test_where_all_verdicts_are_alike_the_interval_is_no_point() -> None:
    assert _judged(1.0, 1.0, 1.0).interval == wilson(1.0, 3)
    assert all(map(math.isnan, _judged(math.nan, math.nan).interval))
    assert "win rate" not in str(_judged(math.nan, math.nan))


def test_the_pairs_are_kept_to_read(tmp_path: Path) -> None:
    found = _judged(1.0, math.nan)
    found.pairs[0].answer.ended = False
    lines = found.write(tmp_path / "deep" / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0]) == {
        "prompt": "p0", "answer": "a b", "other": "c", "won": 1.0, "answer_ended": False,
        "other_ended": True,
    }  # fmt: skip
    assert json.loads(lines[1])["won"] is None
    assert found.to_pandas()["won"].iloc[0] == 1.0
    assert "1 and 0 answers cut" in found.headline


def test_a_page_shows_answers_as_text() -> None:
    pair = Judged("<b>", Answer("<script>"), Answer("x\x1b[31m"), 1.0)
    found = Judgement.of([pair], "them", [(1, 1)])
    assert "<script>" not in found._repr_html_()
    assert "\x1b" not in str(found)
