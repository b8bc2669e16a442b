"""Wrong calls: none ends the process, each is refused or right; the check sees both go wrong."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from rmipo_lite.ops import head, head_blocks
from tests.trials.numbers import abuse
from tests.trials.numbers.wrong_calls import all_calls


def test_every_call_is_refused_or_right(capsys: pytest.CaptureFixture[str]) -> None:
    abuse.make_calls(list(range(200)))
    entries = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {entry["problem"] for entry in entries} == {"not reached", None}
    assert len({entry["tried"] for entry in entries}) == len(all_calls())


def test_targets_that_are_let_through_are_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(head, "check_ids", lambda target_ids, vocab_size: None)
    monkeypatch.setattr(
        head_blocks._Sums, "finish", lambda self, *arguments: None
    )  # nor read by anything later
    abuse.make_calls(list(range(200)))
    entries = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    wrong = [entry for entry in entries if entry["problem"] not in (None, "not reached")]
    assert any("target_ids: -1 in row" in entry["tried"] for entry in wrong)


def _dies_at_the_second(indices: list[int]) -> None:
    for index in indices:
        abuse._say(index, f"call {index}", "not reached")
        if index == 20:
            os.kill(os.getpid(), signal.SIGSEGV)
        abuse._say(index, f"call {index}", None)


@pytest.mark.slow
def test_a_dead_process_is_one_lost_trial(tmp_path: Path) -> None:
    told = abuse.in_children([10, 20, 30], tmp_path, _dies_at_the_second)
    assert told[10] == ("call 10", None)
    assert told[20] == ("call 20", f"the process died: exit {-signal.SIGSEGV}")
    assert told[30] == ("call 30", None)
