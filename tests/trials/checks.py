"""Every check by number, and what is tried elsewhere because it needs things that aren't here."""

from __future__ import annotations

from tests.trials.data import borders, hostile, lengths, rows
from tests.trials.numbers import (
    abuse,
    addresses,
    autograd,
    determinism,
    extremes,
    method,
    model,
    numerics,
    sanitizers,
)
from tests.trials.runs import evaluation, interrupted, memory, processes, soak, survival, training
from tests.trials.scorecard import Check
from tests.trials.users import (
    adapters,
    alarms,
    building,
    forks,
    kinds,
    mistakes,
    options,
    plans,
    said,
)

_MODULES = (
    survival, soak, training, evaluation, memory, processes, interrupted, rows, borders, lengths,
    hostile, numerics, extremes, autograd, determinism, method, abuse, model, addresses, sanitizers,
    building, forks, adapters, kinds, options, said, plans, mistakes, alarms,
)  # fmt: skip
ELSEWHERE = {
    9: "chat templates of trl's wheel (.ci/templates.py)",
    16: "AddressSanitizer and UBSan (.ci/sanitize)",
    31: "output layers of the installed transformers (rmipo-lite selftest)",
    33: "oldest and newest versions of the libraries (.ci/versions)",
    43: "GPU: streams, devices, memory (rmipo-lite selftest)",
}


def all_checks() -> list[Check]:
    """Every check, by number."""
    checks = [check for module in _MODULES for check in module.CHECKS]
    return sorted(checks, key=lambda check: check.number)
