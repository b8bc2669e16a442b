"""The count of a step on a card, against numbers by hand."""

from __future__ import annotations

import pytest
import torch

from benchmarks import roofline
from benchmarks.records import Record, read
from rmipo_lite.planning.cards import find_card
from tests.conftest import ROOT


def test_operations_and_bytes_by_hand() -> None:
    """Two products, one of low rank, a sum, and a view that costs nothing."""
    a, b, low = (torch.empty(s, device="meta") for s in ((128, 256), (256, 512), (256, 16)))
    with roofline._Costs() as costs:
        c = a @ b
        a @ low
        (c + c).view(-1).detach()
        torch.empty_like(c)
    assert dict(costs.found) == {
        ("products", 2 * 128 * 256 * 512, 4 * (128 * 256 + 256 * 512 + 128 * 512)): 1,
        ("elementwise", 2 * 128 * 256 * 16, 4 * (128 * 256 + 256 * 16 + 128 * 16)): 1,
        ("elementwise", 0, 4 * 3 * 128 * 512): 1,
    }


def test_an_operation_takes_the_longer_of_both() -> None:
    card = find_card("RTX 4090")
    layers = roofline._Layers(roofline.MODELS["8B"], roofline.WAYS[3], card, in_4_bits=True)
    assert layers.computing(165e12) == pytest.approx(1000 / 0.88)
    assert layers.moving(1008e9) == pytest.approx(1000 / 0.9)
    found = layers._milliseconds({("products", 165 * 10**12, 1): 2, ("products", 1, 10**9): 1})
    assert found["products"] == pytest.approx(2000 / 0.88 + 1000 / 0.9 / 1008)


def test_float16_reads_its_logits_twice() -> None:
    for name, is_less in (("RTX 4090", True), ("T4", False)):
        once, twice = (
            roofline._head(
                roofline._Layers(roofline.MODELS["0.5B"], way, find_card(name), in_4_bits=False),
                512, way, grad=True,
            )
            for way in (roofline.WAYS[4], roofline.WAYS[3])
        )  # fmt: skip
        assert (once < twice) == is_less


def test_the_page_has_the_table_of_the_rows() -> None:
    rows = read(ROOT / "benchmarks" / "roofline.csv")
    assert roofline.table(rows) in (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_what_each_way_takes() -> None:
    """A model of 16-bit weights that fits whole: the ways of 4 bits change nothing there."""
    rows = list(roofline.rows(quick=True))
    at = {(row.impl, row.metric): row.value for row in rows}
    for part in ("products", "elementwise"):
        before, today = (at[roofline.WAYS[n].name, f"of it {part}"] for n in (0, 4))
        assert before == pytest.approx(today)
    first, today = roofline.WAYS[0].name, roofline.WAYS[4].name
    assert at[today, "of it head"] < 0.95 * at[first, "of it head"]  # 6 bytes moved, not 10
    assert at[today, "of it dequantise"] == 0
    fused = next(way.name for way in roofline.WAYS if way.fused == "layers")
    assert at[fused, "of it elementwise"] < at[today, "of it elementwise"]
    assert at["today, simpo (no prior)", "of it prior"] == 0
    for way in roofline.WAYS:
        parts = [at[way.name, f"of it {p}"] for p in ("products", "elementwise", "dequantise",
                                                     "head", "prior")]  # fmt: skip
        assert sum(parts) == pytest.approx(at[way.name, "a pair"])


def test_the_table_has_a_dash_where_nothing_fits() -> None:
    rows = [
        Record("roofline", way.name, "8B, x", "", "a pair", "ms", value, device=f"counted: {card}")
        for way in roofline.WAYS
        for card, value in zip(roofline.CARDS, (2384.4, "absent: does not fit", 449.0, 1.0, 2.0),
                               strict=True)
    ]  # fmt: skip
    lines = roofline.table(rows).splitlines()
    assert len(lines) == 2 + len(roofline.WAYS)
    assert lines[2] == "| 8B: before | 2384 | - | 449 | 1 | 2 |"
