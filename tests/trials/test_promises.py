"""The table of promises is that of the stored scorecard, and every check is in it."""

from __future__ import annotations

import json

from tests.conftest import ROOT
from tests.trials.checks import all_checks
from tests.trials.promises import PROMISES, table, write_table


def test_every_check_keeps_exactly_one_promise() -> None:
    numbers = [number for _, checks in PROMISES for number in checks]
    assert len(numbers) == len(set(numbers))
    # 42 needs a card and has not been run
    assert {check.number for check in all_checks()} - set(numbers) == {42}


def test_the_page_shows_the_stored_scorecard() -> None:
    content = json.loads((ROOT / "benchmarks" / "trials.json").read_text())
    assert content["trials"] in ("tenth", "all")
    page = (ROOT / "docs" / "promises.md").read_text()
    assert f"begin -->\n{table(content)}\n<!-- selftest: end" in page


def test_lost_trials_and_absent_checks_are_shown(tmp_path) -> None:
    def check(number: int, trials: int, lost: int, absent: str | None = None) -> dict:
        return {"number": number, "trials": trials, "lost": lost, "absent": absent}

    content = {
        "total": "2 checks, 160 trials, 1 lost", "trials": "all", "seed": 0, "date": "2026-01-31",
        "versions": {"torch": "2", "transformers": "5"},
        "checks": [check(1, 100, 1), check(7, 60, 0), check(19, 0, 0, "no threads")],
    }  # fmt: skip
    page = tmp_path / "promises.md"
    page.write_text("a\n<!-- selftest: begin -->\nold\n<!-- selftest: end -->\nb\n")
    write_table(content, page)
    text = page.read_text()
    assert "| A run killed, interrupted or out of disk resumes bit for bit | 1 | 100 | 1 |" in text
    assert (
        "| A damaged checkpoint is found and named, the one before is used | 7 | 60 | 0 |" in text
    )
    assert "2 checks, 160 trials, 1 lost (`python -m tests.trials --trials all`, seed 0" in text
    assert "old" not in text
