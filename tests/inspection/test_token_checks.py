"""What is found in tokens: control text, unknown tokens, borders, cuts, and the length bias."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from rmipo_lite.data.rows import load_rows
from rmipo_lite.inspection.token_checks import TokenChecks, length_bias
from rmipo_lite.tokens.options import TokenizationOptions
from rmipo_lite.tokens.templates import prepare_tokenizer
from rmipo_lite.tokens.tokenize_rows import tokenize_in_chunks
from tests.kit import chat_row, text_row, word_tokenizer

Record = dict[str, Any]


def found(
    records: list[Record], tokenizer: Any, per_chunk: int = 2, **options: Any
) -> dict[str, list[int]]:
    rows, report = load_rows(records)
    chosen = TokenizationOptions(**options)
    prepared = prepare_tokenizer(tokenizer, chosen.chat_template)
    checks = TokenChecks(prepared, chosen)
    start = 0
    for outcomes in tokenize_in_chunks(rows, prepared, chosen, report, per_chunk):
        checks.add(rows[start : start + len(outcomes)], outcomes)
        start += len(outcomes)
    return {finding.name: finding.tally.rows for finding in checks.findings()}


@pytest.fixture(scope="module")
def bpe(references: Path) -> Any:
    return AutoTokenizer.from_pretrained(references / "tokenizer")


def test_clean_rows_have_no_finding(bpe: Any) -> None:
    assert found([text_row("Hi there", " yes", " no")] * 5, bpe) == {}


def test_control_text(bpe: Any) -> None:
    rows = [
        text_row("Hi", " yes", " no"),
        text_row("Hi", " yes</s> then", " no"),
        text_row("<s>", " a", " b"),
    ]
    assert found(rows, bpe)["special_tokens"] == [1, 2]


def test_unknown_tokens() -> None:
    known = word_tokenizer()
    rows = [text_row("w3", "w4 w5", "w6 w7"), text_row("w3", "w4 zzzz", "w6 w7")]
    assert found(rows, known)["unknown_tokens"] == [1]


def test_an_unknown_token_that_is_the_end_token_is_in_every_row(shared: Path) -> None:
    gpt2 = AutoTokenizer.from_pretrained(shared / "tokenizers/gpt2")
    assert gpt2.unk_token_id == gpt2.eos_token_id
    assert "unknown_tokens" not in found([text_row("Hi there", " yes", " no")], gpt2)


def test_borders_of_text_rows(shared: Path) -> None:
    qwen = AutoTokenizer.from_pretrained(shared / "tokenizers/qwen2")
    rows = [
        text_row("A question?\n", "The answer.", "Another."),
        text_row("A question? ", "The answer.", "Another."),
        text_row("A question?", " The answer.", " Another."),
        text_row("It is a tru", "th.", " one."),
        chat_row("A question? ", "The answer.", "Another."),  # the template's border
    ]
    assert found(rows, qwen) == {"border_merges": [1, 3]}


def test_borders_of_a_tokenizer_with_space_marks(shared: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "models/stories260K")
    rows = [
        text_row("Once upon a time", " there was", " he ran"),
        text_row("Once upon a ti", "me.", "de."),
    ]
    assert found(rows, tokenizer)["border_merges"] == [1]


def test_cuts_and_which_side_they_hit(bpe: Any) -> None:
    long, short = " word" * 60, " a"
    rows = [
        text_row("Hi", short, " b"),
        text_row("Hi", long, short),
        text_row("Hi", long, " other" + long),
        text_row("Hi" + long, short, " b"),
    ]
    assert found(rows, bpe, max_length=24) == {"cut_on_one_side": [1], "truncated": [1, 2, 3]}


def test_what_a_template_does_to_answers(bpe: Any) -> None:
    template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim | replace('x', 'y') }}"
        "{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    rows = [chat_row("Hi", "yes", "no"), chat_row("Hi", " yes", "no"), chat_row("Hi", "axb", "no")]
    assert found(rows, bpe, chat_template=template) == {
        "template_rewritten": [2],
        "template_stripped": [1],
    }


# ---- length ---------------------------------------------------------------------------------


def bias(longer: int, shorter: int, same: int) -> Any:
    chosen = np.array([20] * longer + [10] * shorter + [10] * same)
    rejected = np.array([10] * longer + [20] * shorter + [10] * same)
    return length_bias(chosen, rejected, "words")


@pytest.mark.parametrize(
    ("counts", "word"),
    [
        ((70, 30, 100), "longer"),
        ((30, 70, 0), "shorter"),
        ((59, 41, 0), None),  # below 60 %
        ((4, 1, 0), None),  # five pairs are chance
        ((0, 0, 9), None),
    ],
)
def test_length_bias(counts: tuple[int, int, int], word: str | None) -> None:
    facts, finding = bias(*counts)
    assert (finding is None) == (word is None)
    if finding is not None:
        assert finding.text.startswith(f"the {word} response is the chosen one in 70%")
    assert facts[0][0] == "chosen longer"


def test_length_facts() -> None:
    facts, _ = bias(3, 1, 4)
    name, balance = facts.pop()
    assert name == "length balance"
    assert balance.startswith("slope ")
    assert facts == [
        (
            "chosen longer",
            "37.5% of the pairs, shorter in 12.5%; median ratio of lengths 1.00 (words)",
        ),
        ("the longer wins", "75.0% of the pairs of different length"),
    ]
