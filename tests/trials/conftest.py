from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.trials.checks import all_checks
from tests.trials.run import amount
from tests.trials.scorecard import Outcome, Trials, carry_out


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the trials; pytest knows them where it is given `tests/trials` or a file in it."""
    group = parser.getgroup("trials")
    group.addoption("--trials", type=amount, default="tenth", help="how many: tenth, all, or N")
    group.addoption("--trial", type=int, help="repeat one trial, by index")
    group.addoption("--seed", type=int, default=0, help="of every random choice of the trials")


@pytest.fixture
def try_check(tmp_path: Path) -> Iterator[Callable[..., Outcome]]:
    """Carry out some trials of a check, as the scorecard does."""

    def carry(number: int, *indices: int) -> Outcome:
        check = next(check for check in all_checks() if check.number == number)
        folder = tmp_path / f"check-{number}"
        return carry_out(check, Trials(number, 0, folder, list(indices)))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield carry
