"""One record -> (prompt, chosen, rejected), or the reason why not.

The forms people publish, and what becomes of them:

    text, text, text                           text
    messages, [assistant], [assistant]         messages
    (none), conversation, conversation         messages; everything but the last turn is the prompt
    text or messages, conversation x 2         messages, after checking that they agree
    text, [assistant], [assistant]             messages; the text is the user's message
    messages, text, text                       messages; the texts are the assistant's
    (none), transcript, transcript             messages ("\\n\\nHuman: " / "\\n\\nAssistant: ")

A column called system (or system_prompt) is the system message in front of any of them.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

SYSTEM_COLUMNS = ("system", "system_prompt")
Message = dict[str, str]
Side = str | list[Message]

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}
_NAMED = 8  # roles or keys that an example names


_TEXT_OR_MESSAGES = "text or a message list"
_TEXT_MESSAGE = 'messages {"role": text, "content": text}'
_PROMPT = "a prompt column, or conversations with at least one turn before the answer"


class _NotKept(Exception):
    """Why a row goes no further: which columns, what was wanted there, what came instead.

    These three are the same for every row with the same trouble, since rows are counted by them;
    `example` may quote the row.
    """

    def __init__(self, columns: str, wanted: str, got: str, example: str = "") -> None:
        self.columns, self.wanted, self.got = columns, wanted, got
        self.reason = f"{columns}: wanted {wanted}, got {got}"
        self.example = example
        super().__init__(self.reason)


class Refused(_NotKept):
    """A faulty row."""


class Dropped(_NotKept):
    """A sound row that teaches nothing."""


class Identical(Dropped):
    """Two responses that are, or have become, the same."""

    def __init__(self, where: str = "") -> None:
        super().__init__("chosen and rejected", "two different responses", "identical ones" + where)


def normalise(
    record: Any, as_messages: bool = False, columns: tuple[str, str] = ("chosen", "rejected")
) -> tuple[Side, Side, Side]:
    """(prompt, chosen, rejected) of one record: all texts, or all message lists.

    `as_messages`: texts become messages too. So it is where rows of the dataset have system
    messages in a column of their own, in a row without one too. `columns`: where the two sides
    stand; one and the same of a row that has one.

    Raises:
        Refused: wrong types, missing keys, broken messages, prompts that differ.
        Dropped: an empty response, or chosen equal to rejected.
    """
    if not isinstance(record, Mapping):
        raise Refused("row", "a dict with prompt, chosen and rejected", kind_of(record))
    for name in SYSTEM_COLUMNS:
        if _is_given(record.get(name)) and not isinstance(record[name], str):
            raise Refused(name, "text", kind_of(record[name]))
    if len(set(_systems(record))) > 1:
        raise Refused(" and ".join(SYSTEM_COLUMNS), "one text", "two that differ")
    if _is_given(record.get("tools")):
        raise Refused("tools", "nothing (tools are not supported)", kind_of(record["tools"]))
    chosen, rejected = (_side(record, name) for name in columns)
    if type(chosen) is not type(rejected):
        raise Refused(
            "chosen and rejected", "two texts or two message lists", "one text and one message list"
        )
    if "prompt" in record:
        prompt, chosen, rejected = _explicit(_side(record, "prompt"), chosen, rejected)
    else:
        prompt, chosen, rejected = _implicit(chosen, rejected)
    if as_messages:
        prompt, chosen, rejected = _with_system(system_of(record), prompt, chosen, rejected)
    for name, side in zip(columns, (chosen, rejected), strict=True):
        if not text_of_side(side).strip():
            raise Dropped(name, "a response", "an empty or blank one")
    if chosen == rejected and columns[0] != columns[1]:
        raise Identical
    return prompt, chosen, rejected


def system_of(record: Any) -> str:
    """The text of a record's system column, empty where there is none."""
    given = _systems(record) if isinstance(record, Mapping) else []
    return given[0] if given and isinstance(given[0], str) else ""


def _systems(record: Mapping[str, Any]) -> list[Any]:
    return [record[name] for name in SYSTEM_COLUMNS if _is_given(record.get(name))]


def _with_system(
    system: str, prompt: Side, chosen: Side, rejected: Side
) -> tuple[Side, Side, Side]:
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
        chosen = [{"role": "assistant", "content": text_of_side(chosen)}]
        rejected = [{"role": "assistant", "content": text_of_side(rejected)}]
    if not system.strip():
        return prompt, chosen, rejected
    message = {"role": "system", "content": _checked_text(system, "system")}
    if prompt[0]["role"] != "system":
        return [message, *prompt], chosen, rejected
    if prompt[0] != message:
        raise Refused("system", "the system message that the prompt begins with", "another")
    return prompt, chosen, rejected


def _explicit(prompt: Side, chosen: Side, rejected: Side) -> tuple[Side, Side, Side]:
    """Bring a row with a prompt column into one of the two forms."""
    if isinstance(prompt, str) and isinstance(chosen, str):
        return prompt, chosen, rejected
    if isinstance(chosen, str) or isinstance(rejected, str):  # messages, text, text
        chosen = [{"role": "assistant", "content": text_of_side(chosen)}]
        rejected = [{"role": "assistant", "content": text_of_side(rejected)}]
    if len(chosen) > 1 or len(rejected) > 1:
        inside, chosen, rejected = _implicit(chosen, rejected)
        if not _agrees(prompt, inside):
            raise Refused(
                "prompt", "the prompt that the conversations in chosen and rejected hold", "another"
            )
        return inside, chosen, rejected
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    return _checked(prompt, chosen, rejected)


def _agrees(prompt: Side, inside: Side) -> bool:
    """Whether a prompt column says the same as the prompt found inside the conversations."""
    if isinstance(prompt, list):
        return prompt == inside
    contents = [message["content"].strip() for message in inside if isinstance(message, dict)]
    return prompt.strip() in contents


def _implicit(chosen: Side, rejected: Side) -> tuple[Side, Side, Side]:
    """Split the shared prompt off two whole conversations or transcripts."""
    if isinstance(chosen, str) and isinstance(rejected, str):
        chosen, rejected = _transcript(chosen), _transcript(rejected)
    assert isinstance(chosen, list)
    assert isinstance(rejected, list)
    if chosen[:-1] != rejected[:-1]:
        at = next(
            (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b),
            min(len(chosen), len(rejected)),
        )
        raise Refused(
            "chosen and rejected",
            "conversations that differ in the last turn alone",
            "different prompts",
            f"{len(chosen)} and {len(rejected)} turns, the first difference in turn {at}",
        )
    return _checked(chosen[:-1], chosen[-1:], rejected[-1:])


def _checked(
    prompt: list[Message], chosen: list[Message], rejected: list[Message]
) -> tuple[Side, Side, Side]:
    if not prompt:
        raise Refused("prompt", _PROMPT, "none")
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if len(side) != 1 or side[0]["role"] != "assistant":
            raise Refused(name, "one assistant message as its last turn", "another", roles(side))
    if prompt[-1]["role"] == "assistant":
        raise Refused("prompt", "a user message last", "an assistant message", roles(prompt))
    return prompt, chosen, rejected


def _transcript(text: str) -> list[Message]:
    """Messages of an HH transcript; contents lose their outer whitespace."""
    pieces = _TURN.split(text if text.startswith("\n\n") else "\n\n" + text.lstrip("\n"))
    if len(pieces) == 1 or pieces[0].strip():
        raise Refused(
            "prompt", "a prompt column, or transcripts that begin with '\\n\\nHuman: '", "none"
        )
    turns = zip(pieces[1::2], pieces[2::2], strict=True)
    return [{"role": _ROLES[who], "content": content.strip()} for who, content in turns]


def _side(record: Mapping[str, Any], column: str) -> Side:
    if column not in record:
        raise Refused(column, _TEXT_OR_MESSAGES, "nothing (the row has no such key)", _keys(record))
    value = record[column]
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()  # pandas reads lists from parquet as numpy arrays
    if isinstance(value, str):
        return _checked_text(value, column)
    if isinstance(value, list | tuple):
        return [_message(message, column) for message in value]
    raise Refused(column, _TEXT_OR_MESSAGES, kind_of(value))


def _message(message: Any, column: str) -> Message:
    if not isinstance(message, Mapping):
        raise Refused(
            column, f"text, or a list of {_TEXT_MESSAGE}", f"a list of {kind_of(message)}"
        )
    if _is_given(message.get("tool_calls")):
        raise Refused(column, _TEXT_MESSAGE, "tool calls, which are not supported")
    role: Any = message.get("role")
    content: Any = message.get("content")
    if isinstance(content, np.ndarray):
        content = content.tolist()
    if isinstance(content, list | tuple) and all(_is_text_part(part) for part in content):
        content = "".join(part["text"] for part in content)
    for name, value in (("role", role), ("content", content)):
        if not isinstance(value, str):
            got = f"a message whose {name} is {kind_of(value)}" if name in message else f"no {name}"
            raise Refused(column, _TEXT_MESSAGE, got, _keys(message))
    return {"role": _checked_text(role, column), "content": _checked_text(content, column)}


def _is_text_part(part: Any) -> bool:
    return (
        isinstance(part, Mapping)
        and part.get("type") == "text"
        and isinstance(part.get("text"), str)
    )


def _checked_text(text: str, column: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Refused(
            column,
            "text",
            "a lone surrogate or a byte that is not UTF-8",
            f"character {error.start}: {text[error.start]!a}",
        ) from None
    return str(text)  # numpy's texts are a class of their own


def text_of_side(side: Side) -> str:
    """A side as one text."""
    return side if isinstance(side, str) else "".join(message["content"] for message in side)


def roles(messages: Sequence[Message]) -> str:
    """Who speaks, for an example."""
    named = ", ".join(message["role"] for message in messages[:_NAMED])
    return f"roles {named}" + (", ..." if len(messages) > _NAMED else "")


def _keys(record: Mapping[Any, Any]) -> str:
    named = ", ".join(str(key)[:40] for key in itertools.islice(record, _NAMED))
    return f"keys {named or 'none'}" + (", ..." if len(record) > _NAMED else "")


def _is_given(value: Any) -> bool:
    """Whether a column that is mostly empty holds something: no None, NaN, empty list or text."""
    if _is_missing(value):
        return False
    return len(value) > 0 if hasattr(value, "__len__") else True


def _is_missing(value: Any) -> bool:
    """None, NaN of any width, and pandas' NA and NaT."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(value, float | np.floating) and bool(np.isnan(value))


def kind_of(value: Any) -> str:
    """What a value is, in words for an error."""
    if value is None:
        return "None"
    if _is_missing(value):
        return "NaN (an empty cell)"
    if isinstance(value, bool):
        return "a truth value"
    if isinstance(value, int | float):
        return f"a number ({type(value).__name__})"
    return f"a value of type {type(value).__name__}"
