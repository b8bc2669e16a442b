"""Messages that a container flattened are read as what they are, or their row is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rmipo_lite.data.rows import load_rows

_PAIR = {
    "prompt": [{"role": "user", "content": 'Say "it\'s" {once}.'}],
    "chosen": [{"role": "assistant", "content": "it's [fine]"}],
    "rejected": [{"role": "assistant", "content": "no, it isn't"}],
}


@pytest.mark.parametrize("form", [json.dumps, str, lambda value: " " + json.dumps(value, indent=1)])
def test_messages_as_text_are_messages(form: Any) -> None:
    rows, report = load_rows([{name: form(side) for name, side in _PAIR.items()}] * 3)
    assert (rows[0].prompt, rows[0].chosen, rows[0].rejected) == tuple(_PAIR.values())
    assert "prompt, chosen, rejected: messages that stand there as text" in str(report)


def test_one_row_unlike_the_others_is_refused() -> None:
    flat = [{name: json.dumps(side) for name, side in _PAIR.items()} for _ in range(4)]
    flat[1]["chosen"] = "just a text"
    flat[2]["rejected"] = "[{'role': 'assistant', 'content': 'cut"
    rows, report = load_rows(flat)
    assert [row.index for row in rows] == [0, 3]
    assert [tally.rows for tally in report.refused.values()] == [[1], [2]]
    assert "just a text" in str(report)


def test_one_text_that_holds_messages_among_texts_is_refused() -> None:
    plain = [{"prompt": f"q{i}", "chosen": "yes", "rejected": "no"} for i in range(4)]
    plain[3]["chosen"] = json.dumps(_PAIR["chosen"])
    rows, report = load_rows(plain)
    assert len(rows) == 3
    assert "text in chosen, as in the other rows" in next(iter(report.refused))


@pytest.mark.parametrize("text", ["[1, 2] [{x: 3}]", '[{"a": 1}]', "[{'role'", "[" * 5000 + "{"])
def test_other_texts_stay_texts(text: str) -> None:
    rows, report = load_rows([{"prompt": "q", "chosen": text, "rejected": "no"}] * 2)
    assert rows[0].chosen == text
    assert report.read_as == []


def test_a_dict_of_lists_is_a_message_list() -> None:
    columns = {
        side: {"role": [m["role"] for m in messages], "content": [m["content"] for m in messages]}
        for side, messages in _PAIR.items()
    }
    rows, _ = load_rows([columns])
    assert rows[0].chosen == _PAIR["chosen"]
    uneven = {**columns, "chosen": {"role": ["assistant", "user"], "content": ["x"]}}
    _, report = load_rows([columns, uneven])
    assert report.refused_count == 1


def test_the_system_column_is_the_system_turn() -> None:
    with_one = {"system": "Be kind.", "prompt": "q", "chosen": "yes", "rejected": "no"}
    without = {"system": None, "prompt": "q", "chosen": "yes", "rejected": "no"}
    same = {"system": "Be kind.", **_PAIR}
    same["prompt"] = [{"role": "system", "content": "Be kind."}, *_PAIR["prompt"]]
    rows, report = load_rows([with_one, without, same, {**same, "system": "Be rude."}])
    assert rows[0].prompt == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "q"},
    ]
    assert rows[1].prompt == [{"role": "user", "content": "q"}]
    assert rows[2].prompt == same["prompt"]
    assert [tally.rows for tally in report.refused.values()] == [[3]]
    assert "read as          system" in str(report)
    assert report.ignored_columns == []
    _, report = load_rows([with_one, {**with_one, "system": 3}])
    assert "system: wanted text, got a number (int)" in report.refused


def test_two_system_columns_that_differ_are_refused() -> None:
    both = {"system": "Be kind.", "system_prompt": "Be kind.", "prompt": "q"}
    row = {**both, "chosen": "yes", "rejected": "no"}
    rows, report = load_rows([row, {**row, "system_prompt": "Be rude."}, {**row, "system": None}])
    assert [row.index for row in rows] == [0, 2]
    assert list(report.refused) == [
        "system and system_prompt: wanted one text, got two that differ"
    ]


_ANSWER = {"role": "assistant", "content": 'say "no"'}


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(json.dumps([_ANSWER])),
        "\ufeff" + json.dumps([_ANSWER]),
        json.dumps({"role": ["assistant"], "content": ['say "no"']}),
        str({"role": ["assistant"], "content": ['say "no"']}),
    ],
)
def test_other_writings_of_messages_are_messages(text: str) -> None:
    row = {**_PAIR, "rejected": text}
    rows, report = load_rows([row])
    assert rows[0].rejected == [_ANSWER]
    assert report.read_as == ["rejected: messages that stand there as text"]


_REFUSED_TOO = [
    [{"from": "gpt", "value": "x"}],
    {"from": "gpt", "value": "x"},
    {"role": "assistant", "content": "x"},
    {"messages": [{"role": "assistant", "content": "x"}]},
    [{"Role": "assistant", "Content": "x"}],
    [{"role": "assistant", "content": "x"}, {"role": "assistant", "tool_calls": []}],
    [{"role": "assistant", "content": "x"}, 3],
]


@pytest.mark.parametrize("value", _REFUSED_TOO)
@pytest.mark.parametrize("form", [json.dumps, str])
def test_what_is_refused_as_a_list_is_refused_as_text(value: Any, form: Any) -> None:
    row = {"prompt": "q", "chosen": "yes", "rejected": "no"}
    good = {"prompt": "q", "chosen": [_ANSWER], "rejected": [{**_ANSWER, "content": "x"}]}
    as_value = load_rows([good, {**good, "chosen": value}])[1].refused
    as_text = load_rows([good, {**good, "chosen": form(value)}])[1].refused
    assert as_text == as_value
    assert len(as_text) == 1
    rows, report = load_rows([row, row, {**row, "chosen": form(value)}])
    assert len(rows) == 2
    assert "text in chosen, as in the other rows" in next(iter(report.refused))


def test_messages_that_nobody_can_read_are_never_trained_on_as_text() -> None:
    text = "[{'role': 'user', 'content': 'q'}\n {'role': 'assistant', 'content': 'a'}]"  # numpy's
    with pytest.raises(ValueError, match="got a text that can't be read so"):
        load_rows([{"prompt": "q", "chosen": text, "rejected": text}] * 2)


@pytest.mark.parametrize(
    "text",
    [
        '{"role": "admin", "name": "x"}',
        '{"role": "a", "content": "b"} is the answer.',
        '[{"note": {"role": 1, "content": 2}}]',
        '{"a": 1}',
        '"{not json}"',
        '"' + " " * 100_000 + "x",
        '{"from": "Rome", "to": "Paris"}',
    ],
)
def test_texts_of_braces_stay_texts(text: str) -> None:
    rows, report = load_rows([{"prompt": "q", "chosen": text, "rejected": "no"}] * 2)
    assert rows[0].chosen == text
    assert report.read_as == []
