"""The frame of the scorecard: what counts as lost, what repeats it, what is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rmipo_lite.selftest.run import as_json, total_line
from tests.trials import checks as listed
from tests.trials.__main__ import main
from tests.trials.checks import ELSEWHERE, all_checks
from tests.trials.run import indices, scorecard
from tests.trials.scorecard import Check, Loss, Trials, carry_out, expect
from tests.trials.test_trials import told


def _dice(trials: Trials) -> None:
    """Trial 3 is lost, trial 4 raises, and every trial says what it drew."""
    for trial in trials:
        with trial:
            trial.tried = f"drew {trial.rng.randrange(10**6)}"
            assert trial.folder.is_dir()
            expect(trial.index != 3, "three is lost")
            if trial.index == 4:
                raise RuntimeError("four breaks")


DICE = Check(90, "dice", 20, _dice)


def _carry_out(check: Check, folder: Path, indices: list[int]):
    return carry_out(check, Trials(check.number, 0, folder / "check", indices))


def test_lost_trials_are_told_and_the_others_go_on(tmp_path: Path) -> None:
    outcome = _carry_out(DICE, tmp_path, list(range(6)))
    assert (outcome.trials, outcome.lost) == (6, 2)
    assert [loss.message for loss in outcome.losses] == [
        "three is lost", "RuntimeError: four breaks"
    ]  # fmt: skip
    assert "_dice" in outcome.losses[1].where
    assert list(tmp_path.iterdir()) == []


def test_a_trial_is_the_same_alone(tmp_path: Path) -> None:
    together = _carry_out(DICE, tmp_path, [2, 3]).losses[0]
    alone = _carry_out(DICE, tmp_path, [3]).losses[0]
    assert together == alone


def test_a_check_that_fails_outside_its_trials_loses_the_rest(tmp_path: Path) -> None:
    def breaks(trials: Trials) -> None:
        for trial in trials:
            with trial:
                pass
            if trial.index == 1:
                raise OSError("no room")

    outcome = _carry_out(Check(91, "breaks", 5, breaks), tmp_path, list(range(5)))
    assert (outcome.trials, outcome.lost) == (5, 4)  # trial 1 was not counted when it broke
    assert "the check itself failed: OSError: no room" in outcome.losses[0].message


def test_fewer_trials_are_spread_over_all() -> None:
    assert indices(DICE, "all") == list(range(20))
    assert indices(DICE, "tenth") == [0, 10]
    assert indices(DICE, "5") == [0, 4, 8, 12, 16]
    assert indices(DICE, "100") == list(range(20))
    assert indices(Check(90, "", 20, _dice, is_long=True), "2") == [0]
    assert indices(Check(90, "", 20, _dice, least=5), "tenth") == [0, 4, 8, 12, 16]
    assert indices(DICE, "all", trial=7) == [7]
    assert indices(DICE, "all", trial=20) == []


def test_the_scorecard_is_complete() -> None:
    """Every number that belongs here is here once, with its count."""
    checks = all_checks()
    counts = {n: sum(c.all for c in checks if c.number == n) for n in {c.number for c in checks}}
    wanted = {
        1: 100, 2: 40, 3: 1000, 4: 2000, 5: 30, 6: 40, 7: 60, 8: 3000, 10: 200, 11: 24, 12: 200,
        13: 50, 14: 30, 15: 200, 17: 12, 18: 20, 19: 20, 20: 200, 21: 60, 23: 100, 24: 10, 25: 20,
        26: 25, 27: 10, 28: 3, 29: 10, 30: 20, 32: 16, 35: 23, 36: 10, 37: 40, 38: 20, 39: 10,
        41: 21, 42: 4, 44: 1,
        45: 60, 46: 400, 47: 60, 48: 16, 49: 1,
    }  # fmt: skip
    assert len({check.name for check in checks}) == len(checks)
    assert counts.keys() == wanted.keys() | {22, 34}
    assert [n for n, count in wanted.items() if counts[n] < count] == []
    assert not counts.keys() & ELSEWHERE.keys()
    tenths = [len(indices(check, "tenth")) for check in checks if "GPU" not in check.name]
    assert sum(tenths) >= 945


def test_rows_total_and_how_to_repeat(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = Check(92, "needs a card", 3, _dice, absent=lambda: "no card here")
    monkeypatch.setattr(listed, "all_checks", lambda: [DICE, absent])
    outcomes = scorecard("all", seed=5)
    out = capsys.readouterr().out
    assert total_line(outcomes) == "1 checks, 20 trials, 2 lost"
    assert out.splitlines()[0].startswith("seed 5, all")
    assert out.splitlines()[-1].startswith("1 checks, 20 trials, 2 lost")
    assert "python -m tests.trials --trials all --seed 5 --only 90 --trial 3 --debug" in out
    assert "needs a card" in out
    assert "not run: no card here" in out
    content = json.loads(as_json(outcomes, trials="all", seed=5))
    assert content["total"] == "1 checks, 20 trials, 2 lost"
    assert [check["lost"] for check in content["checks"]] == [2, 0]
    assert {"torch", "transformers", "rmipo_lite"} <= content["versions"].keys()


def test_exit_code_json_and_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(listed, "all_checks", lambda: [DICE])
    page = tmp_path / "page.md"
    page.write_text("<!-- selftest: begin -->\n<!-- selftest: end -->\n")
    assert main([]) == 0  # trials 0 and 10
    assert main(["--trials", "all", "--json", str(tmp_path / "a.json"), "--table", str(page)]) == 1
    assert "2 lost" in capsys.readouterr().out
    assert json.loads((tmp_path / "a.json").read_text())["checks"][0]["lost"] == 2
    assert "1 checks, 20 trials, 2 lost (`python -m tests.trials --trials all`" in page.read_text()
    assert main(["--only", "90", "--trial", "2"]) == 0
    for words in (["--only", "ninety"], ["--only", "9"], ["--trial", "20"], ["--trials", "0"]):
        with pytest.raises(SystemExit):
            main(words)
    assert "no check 9 here: it is chat templates" in capsys.readouterr().err


def test_a_lost_trial_is_told_with_how_to_repeat_it() -> None:
    losses = [Loss(place, "a bit", "was not found", "the traceback") for place in range(9)]
    text = told(losses, "tests/trials/test_trials.py::test_nothing_is_lost[7-x]", 3)
    assert text.startswith("9 lost\ntrial 0 (a bit): was not found")
    assert "[7-x]' -m trial --seed 3 --trial 4" in text
    assert "--trial 5" not in text
