"""The kernels behind a tool, tried on the CPU: they run, and what it reports is found."""

from __future__ import annotations

import sys

import pytest

from rmipo_lite.ops import library
from tests.trials.numbers import sanitizers
from tests.trials.scorecard import Lost


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "initcheck"])
def test_the_kernels_behind_a_tool(tool: str) -> None:
    if not library.status("cpu").available:
        pytest.skip(str(library.status("cpu").reason))
    sanitizers.under_tool(tool, "cpu", [])


def test_what_a_tool_reports_is_found() -> None:
    report = [sys.executable, "-c", "print('ERROR SUMMARY: 3 errors'); print('kernels ran')"]
    with pytest.raises(Lost, match="3 errors"):
        sanitizers.under_tool("memcheck", "cpu", report)
    with pytest.raises(Lost, match="did not run"):
        sanitizers.under_tool("memcheck", "cpu", ["true"])
