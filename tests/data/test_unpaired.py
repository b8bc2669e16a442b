"""Unpaired rows: whose completion stands where, and what is said of rows that can't be used."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rmipo_lite.data.rows import load_rows
from rmipo_lite.data.unpaired import mismatched, weights_advice


def _rows(*labels: Any, prompts: str = "abcdefgh") -> list[dict[str, Any]]:
    return [
        {"prompt": f"{prompt}?", "completion": f"answer {number}", "label": label}
        for number, (prompt, label) in enumerate(zip(prompts, labels, strict=False))
    ]


def test_a_rows_own_completion_stands_where_its_label_says() -> None:
    rows, report = load_rows(_rows(True, False, 1), unpaired=True)
    assert [row.label for row in rows] == [True, False, True]
    assert [(row.chosen, row.rejected) for row in rows] == [
        ("answer 0", "answer 2"), ("answer 0", "answer 1"), ("answer 2", "answer 1")
    ]  # fmt: skip
    assert [row.responses for row in rows] == [
        {"chosen": "answer 0"}, {"rejected": "answer 1"}, {"chosen": "answer 2"}
    ]  # fmt: skip
    assert (report.desirable, report.undesirable) == (2, 1)
    assert ("labels", "2 desirable, 1 undesirable") in report.facts()


def test_a_mismatched_completion_is_another_prompts() -> None:
    assert mismatched(["a", "a", "b", "b", "a"], list("12345")) == ["4", "4", "2", "2", "4"]
    assert mismatched(["a", "b", "b"], list("123")) == ["3", "1", "1"]
    assert mismatched(["a", "a", "a"], list("123")) == ["3", "1", "2"]  # there is no other
    message = [{"role": "assistant", "content": "2"}]
    assert mismatched(["a", "b"], ["1", message]) == ["2", [{"role": "assistant", "content": "1"}]]


def test_pairs_are_two_rows_each() -> None:
    pairs = [{"prompt": f"{p}?", "chosen": f"good {p}", "rejected": f"bad {p}"} for p in "ab"]
    pairs.append({"prompt": "c?", "chosen": "same", "rejected": "same"})
    rows, report = load_rows(pairs, unpaired=True)
    assert [(row.index, row.label, *row.responses.values()) for row in rows] == [
        (0, True, "good a"), (1, False, "bad a"), (2, True, "good b"), (3, False, "bad b")
    ]  # fmt: skip
    assert rows[0].rejected == rows[1].chosen == "bad b"
    assert (report.total, report.kept, report.dropped_count) == (6, 4, 2)
    assert report.identical_pairs == 2


def test_conversations_with_the_prompt_inside(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    lines = [
        {"completion": [
            {"role": "user", "content": "Hello?"}, {"role": "assistant", "content": f"Answer {n}"}
        ], "label": n == 0}
        for n in range(2)
    ]  # fmt: skip
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    rows, _ = load_rows(str(file), unpaired=True)
    assert rows[0].prompt == [{"role": "user", "content": "Hello?"}]
    assert rows[1].responses == {"rejected": [{"role": "assistant", "content": "Answer 1"}]}


def test_a_csv_has_its_labels_as_texts(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("prompt,completion,label\na,1,True\nb,2,false\nc,3,0\nd,4,1\n")
    rows, report = load_rows(str(file), unpaired=True)
    assert [row.label for row in rows] == [True, False, False, True]
    assert not report.ignored_columns


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"label": "maybe"}, "label: wanted true or false (1 or 0), got 'maybe'"),
        ({"label": 2}, "label: wanted true or false (1 or 0), got 2"),
        ({"label": None}, "label: wanted true or false (1 or 0), got None"),
        ({"label": float("nan")}, "label: wanted true or false (1 or 0), got NaN (an empty cell)"),
        ({"completion": 3}, "completion: wanted text or a message list, got a number (int)"),
        ({"completion": " "}, "completion: wanted a response, got an empty or blank one"),
        (
            {"completion": [{"role": "user", "content": "x"}]},
            "completion: wanted one assistant message as its last turn, got another",
        ),
    ],
)
def test_a_row_that_cannot_be_used_is_counted_with_its_reason(
    row: dict[str, Any], told: str
) -> None:
    given = _rows(True, False, True)
    given[1] |= row
    rows, report = load_rows(given, unpaired=True)
    assert [row.index for row in rows] == [0, 2]
    assert [*report.refused, *report.dropped] == [told]


def test_a_completion_may_be_several_rows() -> None:
    """A classifier's answers are few, and no pair of them is identical by being so."""
    given = [{"prompt": f"{n}?", "completion": "yes", "label": n % 2 == 0} for n in range(4)]
    rows, report = load_rows(given, unpaired=True)
    assert len(rows) == 4
    assert report.identical_pairs == 0


@pytest.mark.parametrize(
    ("dataset", "unpaired", "told"),
    [
        (_rows(True, False), False, "are unpaired, and loss_type='kto' alone trains on such"),
        (
            [{"prompt": "a", "answer": "b", "good": 1}],
            True,
            "Nearest match: dataset.rename_columns",
        ),
        (_rows(True), True, "only 1 usable row among the 1 of list:"),
        (_rows("no"), True, "Wanted at least two rows with prompt, completion, label"),
    ],
)
def test_a_dataset_that_cannot_be_used(dataset: Any, unpaired: bool, told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        load_rows(dataset, unpaired=unpaired)


def test_uneven_labels_have_a_weight_that_evens_them_out() -> None:
    assert weights_advice([True] * 100 + [False] * 80, 1.0, 1.0) is None
    assert weights_advice([True] * 100 + [False] * 100, 1.0, 1.0) is None
    advice = weights_advice([True] * 50 + [False] * 100, 1.0, 1.0)
    assert advice is not None
    assert "desirable_weight from 2.00 to 2.67" in advice
    assert weights_advice([True] * 50 + [False] * 100, 2.0, 1.0) is None
    assert "every row is undesirable" in str(weights_advice([False] * 3, 1.0, 1.0))
