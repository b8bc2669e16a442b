"""The README's table of promises is that of the stored scorecard, and every check is in it."""

from __future__ import annotations

import json

from tests.trials.run import all_checks
from tests.conftest import ROOT
from tests.trials.promises import PROMISES, main, table


def test_every_check_keeps_exactly_one_promise() -> None:
    numbers = [number for _, checks in PROMISES for number in checks]
    assert len(numbers) == len(set(numbers))
    # 42 and 43 need a card and have not been run
    assert {check.number for check in all_checks()} - set(numbers) == {42, 43}


def test_the_readme_shows_the_stored_scorecard() -> None:
    content = json.loads((ROOT / "benchmarks" / "selftest.json").read_text())
    assert content["mode"] in ("default", "soak")
    assert f"begin -->\n{table(content)}\n<!-- selftest: end" in (ROOT / "README.md").read_text()


def test_lost_trials_and_absent_checks_are_shown(tmp_path) -> None:
    def check(number: int, trials: int, lost: int, absent: str | None = None) -> dict:
        return {"number": number, "trials": trials, "lost": lost, "absent": absent}

    content = {
        "total": "2 checks, 160 trials, 1 lost", "mode": "soak", "seed": 0, "date": "2026-01-31",
        "versions": {"torch": "2", "transformers": "5"},
        "checks": [check(1, 100, 1), check(7, 60, 0), check(19, 0, 0, "no threads")],
    }  # fmt: skip
    (tmp_path / "card.json").write_text(json.dumps(content))
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- selftest: begin -->\nold\n<!-- selftest: end -->\nb\n")
    main(str(tmp_path / "card.json"), str(readme))
    text = readme.read_text()
    assert "| A run killed, interrupted or out of disk resumes bit for bit | 1 | 100 | 1 |" in text
    assert (
        "| A damaged checkpoint is found and named, the one before is used | 7 | 60 | 0 |" in text
    )
    assert "2 checks, 160 trials, 1 lost (`rmipo-lite selftest --soak`, seed 0" in text
    assert "old" not in text
