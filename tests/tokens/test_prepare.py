"""Load, options, tokenise in one call, for whatever comes in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import LlamaConfig

from rmipo_lite.config import RMiPOConfig
from rmipo_lite.data.rows import load_rows
from rmipo_lite.tokens.prepare import prepare
from tests.kit import random_pairs, word_rows, word_tokenizer


def test_rows_loaded_before_and_tokenised_pairs_are_taken_as_they_are(tmp_path: Path) -> None:
    args, config = RMiPOConfig(str(tmp_path)), LlamaConfig(max_position_embeddings=64)
    raw = prepare(word_rows(6), word_tokenizer(), args, config)
    assert raw.report is not None
    assert len(raw.pairs) == raw.report.kept
    loaded = prepare(load_rows(word_rows(6)), word_tokenizer(), args, config)
    assert loaded.pairs == raw.pairs
    assert [row.index for row in loaded.rows] == list(range(6))
    pairs = random_pairs(3)
    assert prepare(pairs, word_tokenizer(), args, config) == (pairs, [], None)


@pytest.mark.parametrize(
    ("loss_type", "label", "told"),
    [("kto", None, "takes pairs with a label, true or false"), ("dpo", True, "without a label")],
)
def test_pairs_of_another_kind_than_the_methods_are_refused(
    loss_type: str, label: bool | None, told: str, tmp_path: Path
) -> None:
    args, config = RMiPOConfig(str(tmp_path), loss_type=loss_type), LlamaConfig()
    rows = load_rows(word_rows(2))
    labelled = rows._replace(rows=[replace(row, label=label) for row in rows.rows])
    pairs = [replace(pair, label=label) for pair in random_pairs(3)]
    for given in (labelled, pairs):
        with pytest.raises(ValueError, match=told):
            prepare(given, word_tokenizer(), args, config)


def test_an_error_calls_the_dataset_by_the_callers_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^eval_dataset: "):
        prepare(
            [], word_tokenizer(), RMiPOConfig(str(tmp_path)), LlamaConfig(), argument="eval_dataset"
        )
