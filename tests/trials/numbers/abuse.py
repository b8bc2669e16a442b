"""The operators called wrongly: an exception or the right result, and never a dead process.

The calls run in a child, and what is counted is whether it lives. A trial is two calls of a list:
good calls with one argument replaced.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tests.trials.numbers.wrong_calls import all_calls
from tests.trials.runs.children import start
from tests.trials.scorecard import Check, Trials, expect

_TRIALS, _CALLS_EACH = 200, 2  # together as many as there are calls
_STEP = 7919  # a prime: a tenth of the trials, spread over the indices, still meets every kind


def called_wrongly(trials: Trials) -> None:
    """Check 15: the call of each index, in children."""
    told = in_children(trials.indices, trials.folder)
    for trial in trials:
        with trial:
            trial.tried, problem = told[trial.index]
            expect(problem is None, str(problem))


def in_children(
    indices: list[int], folder: Path, job: Callable[[list[int]], None] | None = None
) -> dict[int, tuple[str, str | None]]:
    """Index -> what was called and what was wrong with that; another child where one died."""
    told: dict[int, tuple[str, str | None]] = {}
    left, started = list(indices), 0
    while left:
        output = folder / f"child-{started}"
        started += 1
        child = start(job or make_calls, left, output=output)
        code = child.wait()
        for line in child.text().splitlines():
            if line.startswith('{"call": '):
                entry = json.loads(line)
                told[entry["call"]] = (entry["tried"], entry["problem"])
        left = [index for index in left if told.get(index, ("", "not reached"))[1] == "not reached"]
        if code and left:  # the one it was at
            told[left[0]] = (told.get(left[0], ("", None))[0], f"the process died: exit {code}")
            left = left[1:]
        elif left:
            raise RuntimeError(f"the child ended early: {child.text()[-300:]}")
    return told


def make_calls(indices: list[int]) -> None:
    """In the child: say what is to be called, call it, say how it went."""
    calls = all_calls()
    for index in indices:
        places = [(index + turn * _TRIALS) * _STEP % len(calls) for turn in range(_CALLS_EACH)]
        for text, call in (calls[place] for place in places):
            _say(index, text, "not reached")
            try:
                call()
            except Exception as error:
                _say(index, text, f"{type(error).__name__}: {error}"[:300])
                break
        else:
            _say(index, text, None)


def _say(index: int, text: str, problem: str | None) -> None:
    line = json.dumps({"call": index, "tried": text, "problem": problem})
    print(line, flush=True)  # noqa: T201 - what the parent reads


CHECKS = [Check(15, "operators called wrongly", _TRIALS, called_wrongly)]
