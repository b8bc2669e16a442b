"""The scorecard as tests, one a check: `pytest tests/trials -m trial [--trials all]`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.trials.checks import all_checks
from tests.trials.run import indices, one
from tests.trials.scorecard import Check, Loss

_SHOWN = 5  # of the lost trials


def _name(check: Check) -> str:
    words = re.sub(r"\W+", "-", check.name).strip("-")
    return f"{check.number}-{words}"


@pytest.mark.trial
@pytest.mark.parametrize("check", all_checks(), ids=_name)
def test_nothing_is_lost(check: Check, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    option = request.config.getoption
    trials, seed = option("--trials", "tenth"), option("--seed", 0)
    places = indices(check, trials, option("--trial", None))
    if not places:
        pytest.skip("no trial of this index")
    outcome = one(check, places, tmp_path, seed, thorough=trials == "all")
    if outcome.absent is not None:
        pytest.skip(outcome.absent)
    if outcome.lost:
        pytest.fail(told(outcome.losses, request.node.nodeid, seed), pytrace=False)


def told(losses: list[Loss], node: str, seed: int) -> str:
    """The lost trials, how to repeat each, and the first one's traceback."""
    lines = [f"{len(losses)} lost"]
    for loss in losses[:_SHOWN]:
        lines += [
            f"trial {loss.trial} ({loss.tried}): {loss.message}",
            f"repeat: pytest '{node}' -m trial --seed {seed} --trial {loss.trial}",
        ]
    return "\n".join([*lines, *losses[0].where.splitlines()])
