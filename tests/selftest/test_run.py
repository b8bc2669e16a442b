"""The frame of the self-test: what is lost, what is told, what comes out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from rmipo_lite.cli.main import main
from rmipo_lite.output.console import say
from rmipo_lite.selftest import run as run_module
from rmipo_lite.selftest.check import Case, Check, carry_out, expect
from rmipo_lite.selftest.run import all_checks, as_json, selftest, total_line


def _breaks() -> None:
    raise RuntimeError("it breaks")


def _dice(folder: Path, seed: int) -> Iterator[Case]:
    assert folder.is_dir()
    yield "good", lambda: say("not to be seen")
    yield "bad", lambda: expect(False, "three is lost")
    yield "worse", _breaks


def _cannot(folder: Path, seed: int) -> Iterator[Case]:
    yield "good", lambda: None
    raise OSError("no room")


DICE = Check(90, "dice", _dice)


def test_lost_cases_are_told_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = carry_out(DICE, tmp_path / "dice", 0)
    assert outcome.trials == 3
    assert [loss[:2] for loss in outcome.losses] == [
        ("bad", "three is lost"), ("worse", "RuntimeError: it breaks")
    ]  # fmt: skip
    assert "_breaks" in outcome.losses[1][2]
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_cases_that_cannot_be_made_are_lost(tmp_path: Path) -> None:
    outcome = carry_out(Check(91, "breaks", _cannot), tmp_path / "cannot", 0)
    assert (outcome.trials, len(outcome.losses)) == (2, 1)
    assert outcome.losses[0][:2] == ("making the cases", "OSError: no room")


def test_rows_total_and_how_to_repeat(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    absent = Check(92, "needs a card", _dice, lambda: "no card here")
    monkeypatch.setattr(run_module, "all_checks", lambda: [DICE, absent])
    outcomes = selftest(seed=5)
    out = capsys.readouterr().out
    assert total_line(outcomes) == "1 checks, 3 trials, 2 lost"
    assert out.splitlines()[0] == f"seed 5; its checkpoints are on the disk of {tmp_path}"
    assert out.splitlines()[-1].startswith("1 checks, 3 trials, 2 lost")
    assert "lost (bad): three is lost" in out
    assert "rmipo-lite selftest --seed 5 --only 90 --debug" in out
    assert "not run: no card here" in out
    assert list(tmp_path.iterdir()) == []
    content = json.loads(as_json(outcomes, seed=5))
    assert content["total"] == "1 checks, 3 trials, 2 lost"
    assert [check["lost"] for check in content["checks"]] == [2, 0]
    assert {"torch", "transformers", "rmipo_lite"} <= content["versions"].keys()


def test_exit_code_and_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    good = Check(93, "good", lambda folder, seed: [("good", lambda: None)])
    monkeypatch.setattr(run_module, "all_checks", lambda: [DICE, good])
    assert main(["selftest", "--quick", "--only", "93", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["total"] == "1 checks, 1 trials, 0 lost"
    assert main(["selftest", "--json", str(tmp_path / "card.json")]) == 1
    assert "2 lost" in capsys.readouterr().out
    assert json.loads((tmp_path / "card.json").read_text())["checks"][0]["lost"] == 2
    assert main(["selftest", "--only", "ninety"]) == 2
    assert main(["selftest", "--only", "9"]) == 1
    assert "no check 9 here; there are 90, 93" in capsys.readouterr().err


def test_it_is_small_and_needs_nothing_of_the_tests() -> None:
    files = list(Path(run_module.__file__).parent.glob("*.py"))
    texts = [file.read_text() for file in files]
    assert sum(text.count("\n") for text in texts) < 1000
    assert not [file for file, text in zip(files, texts, strict=True) if "import tests" in text]
    assert {check.number for check in all_checks()} == {1, 4, 12, 17, 19, 22, 24, 31, 43}
