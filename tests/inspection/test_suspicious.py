"""The three rules: whom they find, in which order, and what they say."""

from __future__ import annotations

import math

import numpy as np

from rmipo_lite.data.rows import Row
from rmipo_lite.inspection.suspicious import RULES, candidates, pairs_of

# row -> chosen_logps, rejected_logps, chosen_pmi, rejected_pmi, all nats per token
VALUES = {
    10: (-1.0, -2.0, 0.8, 0.1),  # as labelled
    11: (-2.0, -1.0, 0.1, 0.9),  # the model wants the other, for the prompt's sake
    12: (-2.0, -1.0, 0.9, 0.5),  # likelier without the prompt too: a common text
    13: (-3.0, -1.0, 0.3, 0.9),
    14: (-1.0, -2.0, 0.05, 0.6),  # generic, though likely
    15: (-1.0, -2.0, 0.05, 0.0),  # neither depends on the prompt
    16: (-2.0, -1.0, math.nan, 0.9),  # PMI undefined
    17: (math.nan, -1.0, math.nan, math.nan),  # not scored
}
NAMES = ("chosen_logps", "rejected_logps", "chosen_pmi", "rejected_pmi")
ROWS = [Row(index, f"p{index}", f"c{index}", f"r{index}") for index in VALUES]
COLUMNS = {
    name: np.array([values[place] for values in VALUES.values()], np.float32)
    for place, name in enumerate(NAMES)
}


def rows_of(places: list[int]) -> list[int]:
    return [ROWS[place].index for place in places]


def test_whom_the_rules_find() -> None:
    found = candidates(ROWS, COLUMNS, {12: 0.95, 10: 0.91, 15: 1.0, 14: 0.95})
    assert set(found) == set(RULES)
    assert rows_of(found["label"]) == [13, 11]
    assert rows_of(found["generic"]) == [11, 14]
    assert rows_of(found["almost_equal"]) == [15, 12, 14, 10]


def test_without_a_model_there_is_likeness_alone() -> None:
    assert candidates(ROWS, {}, {11: 0.9}) == {"label": [], "generic": [], "almost_equal": [1]}


def test_what_a_pair_says() -> None:
    similarity = {11: 0.996, 10: 1.0}
    (label,) = pairs_of("label", [1], ROWS, COLUMNS, similarity)
    assert (label.row, label.prompt, label.chosen, label.rejected) == (11, "p11", "c11", "r11")
    assert label.numbers["chosen_logps"] == -2.0
    assert "logps -2.00 against -1.00, PMI 0.10 against 0.90" in label.why
    (generic,) = pairs_of("generic", [4], ROWS, COLUMNS, similarity)
    assert generic.why.endswith("depends on the prompt: PMI 0.05 against 0.60")
    alike, equal = pairs_of("almost_equal", [1, 0], ROWS, {}, similarity)
    assert alike.numbers == {"similarity": 0.996}
    assert alike.why == "99.6% of the words agree"
    assert equal.why == "they differ in whitespace alone"
