"""The authors' tokenisation, against what their code produced."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from rmipo_lite.data.report import DataReport
from rmipo_lite.data.rows import Row
from rmipo_lite.tokens.authors import AuthorsRules, encode_pair
from rmipo_lite.tokens.options import TokenizationOptions
from rmipo_lite.tokens.pair import TokenizedPair
from rmipo_lite.tokens.tokenize_rows import tokenize_rows

CONFIGS = ("keep_end", "keep_start", "no_trunc")


def recorded(references: Path, name: str) -> Any:
    return json.loads(gzip.decompress((references / name).read_bytes()))


@pytest.fixture(scope="module")
def tokenizer(references: Path) -> Any:
    return AutoTokenizer.from_pretrained(references / "tokenizer")


def rejected_prompt(pair: TokenizedPair) -> list[int]:
    return pair.prompt_ids if pair.rejected_prompt_ids is None else pair.rejected_prompt_ids


def assert_equal(pair: TokenizedPair, row: dict[str, Any]) -> None:
    sides = {
        "chosen": (pair.prompt_ids, pair.chosen_ids),
        "rejected": (rejected_prompt(pair), pair.rejected_ids),
    }
    for side, (prompt, response) in sides.items():
        assert prompt + response == row[f"{side}_input_ids"]
        assert [-100] * len(prompt) + response == row[f"{side}_labels"]


@pytest.mark.parametrize("config", CONFIGS)
def test_every_recorded_row(references: Path, tokenizer: Any, config: str) -> None:
    golden = recorded(references, "tokenized.json.gz")
    inputs = golden["inputs"]
    rows = [Row(i, r["prompt"], r["chosen"], r["rejected"]) for i, r in enumerate(inputs)]
    report = DataReport(total=len(rows), kept=len(rows))
    options = TokenizationOptions(mode="authors", **golden["configs"][config])
    pairs = tokenize_rows(rows, tokenizer, options, report)
    assert len(pairs) == len(inputs) == 26
    for pair, source in zip(pairs, inputs, strict=True):
        assert_equal(pair, golden["rows"][config][source["name"]])
    assert (report.truncated_pairs > 0) == (config != "no_trunc")


def test_odd_rows_give_their_result_or_their_error(references: Path, tokenizer: Any) -> None:
    odd = recorded(references, "tokenize_edge.json.gz")["rows"]
    names = [name for name in odd if isinstance(odd[name]["prompt"], str)]
    names = [name for name in names if isinstance(odd[name]["chosen"], str)]  # load_rows' job
    rows = [
        Row(i, *(odd[name][side] for side in ("prompt", "chosen", "rejected")))
        for i, name in enumerate(names)
    ]
    report = DataReport(total=len(rows), kept=len(rows))
    options = TokenizationOptions(mode="authors", max_length=192, max_prompt_length=128)
    pairs = {pair.row: pair for pair in tokenize_rows(rows, tokenizer, options, report)}
    for row, name in zip(rows, names, strict=True):
        if "error" in odd[name]:
            assert row.index not in pairs
        else:
            assert_equal(pairs[row.index], odd[name]["result"])
    assert report.refused_count == 3
    assert len(pairs) == 5


def test_corner_settings(references: Path, tokenizer: Any) -> None:
    corners = recorded(references, "tokenize_edge.json.gz")["corner_settings"]
    inputs = {row["name"]: row for row in recorded(references, "tokenized.json.gz")["inputs"]}
    checked = 0
    for setting, row in corners.items():
        numbers, name = setting.split("/")
        length, prompt_length, mode = numbers.split(",")
        if mode == "bad_mode":  # refused by the config
            continue
        rules = AuthorsRules(
            0, 1, int(length.split("=")[1]), int(prompt_length.split("=")[1]), mode
        )
        texts = (inputs[name][side] for side in ("prompt", "chosen", "rejected"))
        pair = encode_pair(
            *texts, lambda text: tokenizer(text, add_special_tokens=False).input_ids, rules
        )
        assert pair.chosen_prompt_ids + pair.chosen_ids == row["chosen_input_ids"]
        assert pair.rejected_prompt_ids + pair.rejected_ids == row["rejected_input_ids"]
        assert len(pair.chosen_ids) == row["n_chosen_labels"]
        checked += 1
    assert checked == 15


def test_a_response_cut_to_nothing_is_dropped(tokenizer: Any) -> None:
    rows = [Row(0, "Hi", " a", " b"), Row(1, " word" * 99, " c" * 40, " d" * 40)]
    report = DataReport(total=2, kept=2)
    options = TokenizationOptions(mode="authors", max_length=64, max_prompt_length=64)
    assert [pair.row for pair in tokenize_rows(rows, tokenizer, options, report)] == [0]
    assert [tally.rows for tally in report.dropped.values()] == [[1]]


def test_message_rows_render_prompt_and_answer_apart(tokenizer: Any) -> None:
    row = Row(
        0,
        [{"role": "user", "content": "Hi"}],
        [{"role": "assistant", "content": "yes"}],
        [{"role": "assistant", "content": "no"}],
    )
    template = (
        "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    )
    options = TokenizationOptions(
        mode="authors", max_length=64, max_prompt_length=32, chat_template=template
    )
    (pair,) = tokenize_rows([row], tokenizer, options, DataReport(total=1, kept=1))
    assert tokenizer.decode(pair.prompt_ids + pair.chosen_ids) == "<s>[user]Hi[assistant]yes</s>"
    assert tokenizer.decode(pair.chosen_ids).endswith("assistant]yes</s>")  # header in the answer
