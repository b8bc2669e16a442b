"""Who computes what, who speaks, and that one process meets nobody."""

from __future__ import annotations

import random

import pytest
import torch

from rmipo_lite.cli.main import main
from rmipo_lite.comparing.side_by_side import compare
from rmipo_lite.inspection.inspection import inspect
from rmipo_lite.output.console import in_terminal, rank, say
from rmipo_lite.parallel.group import Group


@pytest.mark.parametrize("size", [2, 3, 8])
def test_every_pair_is_computed_once_and_the_shares_are_alike(size: int) -> None:
    draw = random.Random(size)
    costs = [draw.randrange(50, 900) for _ in range(16 * size)]
    shares = [Group(number, size).share(costs) for number in range(size)]
    assert sorted(place for share in shares for place in share) == list(range(len(costs)))
    assert all(share == sorted(share) for share in shares)
    sums = [sum(costs[place] for place in share) for share in shares]
    assert max(sums) < 1.05 * sum(sums) / size


def test_fewer_pairs_than_processes_leave_some_without() -> None:
    shares = [Group(number, 3).share([5, 9]) for number in range(3)]
    assert sorted(map(len, shares)) == [0, 1, 1]


def test_one_process_does_as_if_there_were_no_group() -> None:
    alone = Group.current()
    assert (alone.rank, alone.size, alone.is_first) == (0, 1, True)
    numbers = torch.ones(2)
    assert alone.add(numbers) is numbers
    assert alone.gather(3) == [3]
    assert alone.agreed(lambda: 4) == alone.from_first(lambda: 4) == 4
    with pytest.raises(KeyError):
        alone.agreed(lambda: {}["nothing"])


def _launched(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    for name, value in (("RANK", number), ("WORLD_SIZE", 2)):
        monkeypatch.setenv(name, str(value))


def test_the_first_speaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _launched(monkeypatch, 1)
    assert rank() == 1
    say("for all")
    say("of mine", of_each=True)
    assert not in_terminal()
    assert main(["info"]) == 0  # it leaves: the first does such work
    out, err = capsys.readouterr()
    assert (out, err) == ("", "process 1: of mine\n")
    monkeypatch.delenv("WORLD_SIZE")
    assert rank() == 0  # some other program's RANK


@pytest.mark.parametrize("call", [inspect, compare])
def test_what_one_process_does_alone_is_refused(
    call: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    _launched(monkeypatch, 0)
    with pytest.raises(ValueError, match="runs in one process, and this is one of 2"):
        call("rows.jsonl", "model")  # type: ignore[operator]
