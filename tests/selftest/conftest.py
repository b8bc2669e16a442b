from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rmipo_lite.selftest.check import Outcome, carry_out
from rmipo_lite.selftest.run import all_checks


@pytest.fixture
def try_check(tmp_path: Path) -> Iterator[Callable[[int], Outcome]]:
    """Carry out the first check of a number, as `rmipo-lite selftest` does."""

    def carry(number: int) -> Outcome:
        check = next(check for check in all_checks() if check.number == number)
        return carry_out(check, tmp_path / f"check-{number}", 0)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield carry
