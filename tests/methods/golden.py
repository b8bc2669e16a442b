"""The numbers recorded from the methods' own public code."""

from __future__ import annotations

import gzip
import json
from functools import cache
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from rmipo_lite.methods.sums import PairSums, pair_sums
from tests.conftest import SHARED

GOLDEN = SHARED / "golden" / "methods"
needs_golden = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason="../shared (recorded numbers) is not on this machine"
)
Opts = dict[str, Any]


@cache
def recorded() -> dict[str, Any]:
    """The file as it is."""
    found: dict[str, Any] = json.loads(
        gzip.decompress((GOLDEN / "methods_golden.json.gz").read_bytes())
    )
    return found


@cache
def golden() -> tuple[list[Opts], dict[str, Any], dict[int, Any]]:
    """Rows, cases by name, and what is right where theirs isn't, by row."""
    found = recorded()
    cases = {case["id"]: case for kind in ("pair_cases", "token_cases") for case in found[kind]}
    exact = json.loads((GOLDEN / "deviations.json").read_text(encoding="utf-8"))
    return found["rows"], cases, {row["row"]: row for row in exact}


def number(value: Any) -> float:
    return float(value.replace("Infinity", "inf")) if isinstance(value, str) else float(value)


def numbers(values: list[Any]) -> Tensor:
    return torch.tensor([number(value) for value in values], dtype=torch.float64)


def sums(case: Opts, dtype: str = "float64") -> tuple[PairSums, Tensor]:
    """The case's sums, and the leaf (2P,) that their gradients are read from."""
    sides = [numbers(case[name]) for name in ("S_w", "S_l", "R_w", "R_l")]
    if dtype == "float32":
        sides = [side.float().double() for side in sides]
    leaf = torch.stack(sides[:2], 1).flatten().requires_grad_()
    lengths = (n for both in zip(case["n_w"], case["n_l"], strict=True) for n in both)
    borders = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return pair_sums(leaf, borders, torch.stack(sides[2:], 1).flatten()), leaf


def close(ours: Tensor, theirs: Tensor, tolerance: float, floor: float) -> bool:
    """Within the tolerance of what is finite; theirs alone may overflow."""
    finite = theirs.isfinite()
    error = (ours - theirs).abs()[finite] / theirs.abs()[finite].clamp(min=floor)
    return bool((error <= tolerance).all())
