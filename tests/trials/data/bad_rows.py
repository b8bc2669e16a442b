"""Preference rows with something wrong, and what the package owes each of them.

A kind makes one row out of a good one and says what must become of it: kept, dropped or refused,
and on account of which columns.
"""

from __future__ import annotations

import datetime
import decimal
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Record = dict[str, Any]
SIDES = ("prompt", "chosen", "rejected")
RESPONSES = "chosen and rejected"
HUGE_CHARS = 300_000
MAX_LENGTH = 48  # tokens that the check tokenises to


@dataclass(frozen=True)
class Bad:
    """A row in place of a good one.

    Attributes:
        what: the kind, in words.
        record: what stands in the dataset.
        fate: "kept", "dropped" or "refused".
        columns: what the reason must begin with; empty where it is kept.
        needs_template: whether it is kept only by a tokenizer with a chat template.
    """

    what: str
    record: Any
    fate: str
    columns: str = ""
    needs_template: bool = False


Kind = Callable[[random.Random, Record], Bad]


def _deep(depth: int = 5000) -> list[Any]:
    nested: list[Any] = []
    for _ in range(depth):
        nested = [nested]
    return nested


# By name, so that a lost trial can say which it was.
WRONG_VALUES: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "NaN": lambda: math.nan,
    "a narrow NaN": lambda: np.float32("nan"),
    "infinity": lambda: math.inf,
    "a number": lambda: 3,
    "a numpy number": lambda: np.int64(3),
    "a truth value": lambda: True,
    "bytes": lambda: b"x",
    "numpy bytes": lambda: np.bytes_(b"x"),
    "an empty dict": dict,
    "a message that is no list": lambda: {"role": "user", "content": "Hi"},
    "a list of a text": lambda: ["a"],
    "a list in a list": lambda: [[]],
    "a deep list": _deep,
    "an array of numbers": lambda: np.array([1, 2]),
    "an array of texts": lambda: np.array(["a", "b"]),
    "a set": lambda: {"a"},
    "a generator": lambda: (text for text in "ab"),
    "an object": object,
    "a class": lambda: str,
    "a date": lambda: datetime.datetime(2020, 1, 1),
    "a decimal": lambda: decimal.Decimal(1),
    "a complex number": lambda: 1j,
    "a view of memory": lambda: memoryview(b"x"),
    "an exception": lambda: ValueError("x"),
}
WRONG_ROWS: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "a number": lambda: 3,
    "a text": lambda: "prompt chosen rejected",
    "bytes": lambda: b"x",
    "a list": lambda: ["a", "b", "c"],
    "a tuple": lambda: ("a", "b", "c"),
    "an array": lambda: np.array(["a", "b", "c"]),
    "a set": lambda: set(SIDES),
    "an object": object,
}
# Messages that are no messages, in place of the last one of a side.
BROKEN_MESSAGES: dict[str, Any] = {
    "None": None,
    "a text": "Hi",
    "an empty dict": {},
    "no role": {"content": "Hi"},
    "no content": {"role": "assistant"},
    "content None": {"role": "assistant", "content": None},
    "content a number": {"role": "assistant", "content": 3},
    "content an image": {"role": "assistant", "content": [{"type": "image", "url": "x"}]},
    "content in lists": {"role": "assistant", "content": [["Hi"]]},
    "role a number": {"role": 3, "content": "Hi"},
    "role a list": {"role": ["assistant"], "content": "Hi"},
    "other names": {"from": "gpt", "value": "Hi"},
    "a surrogate": {"role": "assistant", "content": "a\udfff"},
    "a surrogate as role": {"role": "\ud800", "content": "Hi"},
    "tool calls": {"role": "assistant", "content": "Hi", "tool_calls": np.array([1, 2])},
}
ODD_TEXTS = {
    "NUL": "a\x00b",
    "direction marks": "a\u202eb\u2066c",
    "combining marks": "e\u0301\u0323" * 5,
    "joined emoji": "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1f7",
    "other scripts": "羅馬 مرحبا привет",
    "private use": "\ue000\U0010ffff",
    "a zero-width space": "\u200b",
    "markup": "<script>alert(1)</script>\x1b[31m",
    "template code": "{{ ''.__class__ }}{% for x in y %}",
    "line ends": "a\r\nb\rc\u2028d\x85e",
}
BLANKS = ("", " ", "\n", "\t \r\n", "\u00a0", "\u3000")


def is_chat(row: Record) -> bool:
    """Whether a good row is made of messages."""
    return not isinstance(row["prompt"], str)


def said(row: Record, side: str, text: str) -> Record:
    """The row with another text in one of its sides."""
    if not is_chat(row):
        return {**row, side: text}
    role = "user" if side == "prompt" else "assistant"
    return {**row, side: [{"role": role, "content": text}]}


def wrong_row(rng: random.Random, row: Record) -> Bad:
    """Something else in place of the dict."""
    name = rng.choice(list(WRONG_ROWS))
    return Bad(f"{name} as a row", WRONG_ROWS[name](), "refused", "row")


def missing_key(rng: random.Random, row: Record) -> Bad:
    """A dict without one of the three keys."""
    side = rng.choice(SIDES)
    record = {key: value for key, value in row.items() if key != side}
    # Without a prompt the two texts could be transcripts, and messages whole conversations.
    return Bad(f"no {side}", record, "refused", side)


def wrong_value(rng: random.Random, row: Record) -> Bad:
    """A field of another type."""
    side, name = rng.choice(SIDES), rng.choice(list(WRONG_VALUES))
    return Bad(f"{name} as {side}", {**row, side: WRONG_VALUES[name]()}, "refused", side)


def surrogate(rng: random.Random, row: Record) -> Bad:
    """Half of a pair of UTF-16."""
    side = rng.choice(SIDES)
    text = rng.choice(("\ud800", "a\udfffb", "good so far \udc80"))
    return Bad(f"a surrogate in {side}", said(row, side, text), "refused", side)


def blank(rng: random.Random, row: Record) -> Bad:
    """A response that says nothing."""
    side, text = rng.choice(SIDES[1:]), rng.choice(BLANKS)
    return Bad(f"{text!r} as {side}", said(row, side, text), "dropped", side)


def blank_prompt(rng: random.Random, row: Record) -> Bad:
    """A prompt that says nothing is no fault."""
    return Bad("a blank prompt", said(row, "prompt", rng.choice(BLANKS)), "kept")


def identical(rng: random.Random, row: Record) -> Bad:
    """The same response twice."""
    return Bad("identical responses", {**row, "rejected": row["chosen"]}, "dropped", RESPONSES)


def broken_message(rng: random.Random, row: Record) -> Bad:
    """A message list that is half right."""
    side, name = rng.choice(SIDES), rng.choice(list(BROKEN_MESSAGES))
    head = [{"role": "user", "content": "Hi"}] * rng.randrange(3)
    messages = [*head, BROKEN_MESSAGES[name]]
    record = {**row, side: rng.choice((list, tuple))(messages)}
    return Bad(f"a message that is {name} in {side}", record, "refused", side)


def tools(rng: random.Random, row: Record) -> Bad:
    """A column of tools that is not empty."""
    value = rng.choice(([{"name": "f"}], "[]", {"a": 1}, np.array([1, 2]), 7))
    return Bad(f"tools {value!r}", {**row, "tools": value}, "refused", "tools")


def no_tools(rng: random.Random, row: Record) -> Bad:
    """A column of tools that is empty, as a table with tools elsewhere has it."""
    value: Any = rng.choice((None, math.nan, [], "", np.array([]), np.float32("nan")))
    return Bad(f"tools {value!r}", {**row, "tools": value, "id": 3, "meta": {"a": []}}, "kept")


def wrong_role(rng: random.Random, row: Record) -> Bad:
    """Responses that others speak than the assistant, or several."""
    side = rng.choice(SIDES[1:])
    user = {"role": "user", "content": "Hi"}
    answers = [{"role": "assistant", "content": f"number {number}"} for number in range(2)]
    messages = rng.choice(([user], [{**user, "role": "alien"}], [], [answers[0], user]))
    other = SIDES[3 - SIDES.index(side)]
    # A list in one of them only is another fault, so both are lists.
    record = {**row, side: messages, other: answers[:1]}
    columns = RESPONSES if len(messages) > 1 else side
    return Bad(f"{len(messages)} messages of wrong roles in {side}", record, "refused", columns)


def prefilled(rng: random.Random, row: Record) -> Bad:
    """A prompt in which the assistant spoke last."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    answers = {side: [{"role": "assistant", "content": side}] for side in SIDES[1:]}
    return Bad("an answered prompt", {**row, **answers, "prompt": turns}, "refused", "prompt")


def mixed_sides(rng: random.Random, row: Record) -> Bad:
    """A text against a message list."""
    side = rng.choice(SIDES[1:])
    record = {**said(row, side, "text"), side: "text"}
    other = SIDES[3 - SIDES.index(side)]
    record[other] = [{"role": "assistant", "content": "message"}]
    return Bad(f"text in {side}, messages in {other}", record, "refused", RESPONSES)


def disagreeing(rng: random.Random, row: Record) -> Bad:
    """Conversations with another prompt than the prompt column, or than each other."""
    first, second = ({"role": "user", "content": text} for text in ("one", "two"))
    answers = [{"role": "assistant", "content": side} for side in SIDES[1:]]
    if rng.random() < 0.5:
        sides = {"chosen": [first, answers[0]], "rejected": [second, answers[1]]}
        return Bad("two prompts inside", {**row, **sides}, "refused", RESPONSES)
    sides = {"chosen": [first, answers[0]], "rejected": [first, answers[1]]}
    return Bad("another prompt inside", {**row, **sides, "prompt": "three"}, "refused", "prompt")


def huge(rng: random.Random, row: Record) -> Bad:
    """A text of three hundred thousand characters."""
    side = rng.choice(SIDES)
    word = f"w{SIDES.index(side) + 5} "
    text = word * (HUGE_CHARS // len(word))
    return Bad(f"a huge {side}", said(row, side, text), "kept")


def alike_until_cut(rng: random.Random, row: Record) -> Bad:
    """Responses that differ behind the last token that stays."""
    same = "w9 " * (MAX_LENGTH + 2)
    record = said(said(row, "chosen", same + "w4"), "rejected", same + "w5")
    return Bad("responses that differ after the cut", record, "dropped", RESPONSES)


def odd_text(rng: random.Random, row: Record) -> Bad:
    """Unusual text that is no fault."""
    side, name = rng.choice(SIDES), rng.choice(list(ODD_TEXTS))
    return Bad(f"{name} in {side}", said(row, side, ODD_TEXTS[name] + " w5 w6"), "kept")


def numpy_text(rng: random.Random, row: Record) -> Bad:
    """Texts and lists as pandas and parquet hand them out."""
    if is_chat(row):
        lists = {side: np.array(row[side], dtype=object) for side in SIDES}
        return Bad("arrays of messages", {**row, **lists}, "kept")
    make = rng.choice((np.str_, np.array))
    return Bad("texts of numpy", {**row, **{side: make(row[side]) for side in SIDES}}, "kept")


def text_parts(rng: random.Random, row: Record) -> Bad:
    """Content in parts that are all text."""
    parts = [{"type": "text", "text": word} for word in ("w7", " w8")]
    record = {side: row[side] if is_chat(row) else said_as_chat(row, side) for side in SIDES}
    side = rng.choice(SIDES)
    record[side] = [{**record[side][0], "content": parts}]
    return Bad(f"parts in {side}", record, "kept", needs_template=True)


def said_as_chat(row: Record, side: str) -> list[dict[str, str]]:
    """A side of a text row as a message list."""
    return [{"role": "user" if side == "prompt" else "assistant", "content": row[side]}]


def control_alone(rng: random.Random, row: Record) -> Bad:
    """A response of control tokens and nothing else."""
    side = rng.choice(SIDES[1:])
    return Bad(f"control tokens as {side}", said(row, side, "<s><s>"), "dropped", side)


# One more than these (names of columns) has no factor in common with ten: a tenth of the trials
# meets every kind too.
KINDS: tuple[Kind, ...] = (
    wrong_row, missing_key, wrong_value, surrogate, blank, blank_prompt, identical, broken_message,
    tools, no_tools, wrong_value, wrong_role, prefilled, mixed_sides, broken_message, disagreeing,
    huge, alike_until_cut, odd_text, numpy_text, text_parts, wrong_value, control_alone,
    wrong_row, broken_message, odd_text,
)  # fmt: skip
