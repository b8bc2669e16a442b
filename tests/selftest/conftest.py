from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.trials.run import all_checks
from tests.trials.scorecard import Outcome, Trials, carry_out


@pytest.fixture
def try_check(tmp_path: Path) -> Iterator[Callable[..., Outcome]]:
    """Carry out some trials of a check, as `rmipo-lite selftest` does."""

    def carry(number: int, *indices: int) -> Outcome:
        check = next(check for check in all_checks() if check.number == number)
        folder = tmp_path / f"check-{number}"
        return carry_out(check, Trials(number, 0, "quick", folder, list(indices)))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield carry
