"""One record -> (prompt, chosen, rejected), or the reason why not.

The forms people publish, and what becomes of them:

    text, text, text                           text
    messages, [assistant], [assistant]         messages
    (none), conversation, conversation         messages; everything but the last turn is the prompt
    text or messages, conversation x 2         messages, after checking that they agree
    text, [assistant], [assistant]             messages; the text is the user's message
    messages, text, text                       messages; the texts are the assistant's
    (none), transcript, transcript             messages ("\\n\\nHuman: " / "\\n\\nAssistant: ")
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

Message = dict[str, str]
Side = str | list[Message]

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


class Refused(Exception):
    """A faulty row: a fixed reason, and an example that may quote the row."""

    def __init__(self, reason: str, example: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.example = example


class Dropped(Exception):
    """A sound row that teaches nothing."""

    def __init__(self, reason: str, identical: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.identical = identical


def normalise(record: Any) -> tuple[Side, Side, Side]:
    """(prompt, chosen, rejected) of one record: all texts, or all message lists.

    Raises:
        Refused: wrong types, missing keys, broken messages, prompts that differ.
        Dropped: an empty response, or chosen equal to rejected.
    """
    if not isinstance(record, Mapping):
        raise Refused(f"the row is {_kind(record)}, wanted a dict with prompt, chosen, rejected")
    if _is_given(record.get("tools")):
        raise Refused("the row has tools, which are not supported")
    chosen, rejected = _side(record, "chosen"), _side(record, "rejected")
    if type(chosen) is not type(rejected):
        raise Refused("chosen and rejected are of different kinds, one text and one a message list")
    if "prompt" in record:
        prompt, chosen, rejected = _explicit(_side(record, "prompt"), chosen, rejected)
    else:
        prompt, chosen, rejected = _implicit(chosen, rejected)
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if not _text(side).strip():
            raise Dropped(f"empty {name} response")
    if chosen == rejected:
        raise Dropped("chosen and rejected are identical", identical=True)
    return prompt, chosen, rejected


def _explicit(prompt: Side, chosen: Side, rejected: Side) -> tuple[Side, Side, Side]:
    """Bring a row with a prompt column into one of the two forms."""
    if isinstance(prompt, str) and isinstance(chosen, str):
        return prompt, chosen, rejected
    if isinstance(chosen, str) or isinstance(rejected, str):  # messages, text, text
        chosen = [{"role": "assistant", "content": _text(chosen)}]
        rejected = [{"role": "assistant", "content": _text(rejected)}]
    if len(chosen) > 1 or len(rejected) > 1:
        inside, chosen, rejected = _implicit(chosen, rejected)
        if not _agrees(prompt, inside):
            raise Refused("the prompt column and the conversations in chosen and rejected disagree")
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
        raise Refused(
            "chosen and rejected have different prompts: they differ before the last turn"
        )
    return _checked(chosen[:-1], chosen[-1:], rejected[-1:])


def _checked(
    prompt: list[Message], chosen: list[Message], rejected: list[Message]
) -> tuple[Side, Side, Side]:
    if not prompt:
        raise Refused("no prompt: wanted at least one message before the response")
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if len(side) != 1 or side[0]["role"] != "assistant":
            roles = ", ".join(message["role"] for message in side)
            raise Refused(f"the last turn of {name} is not one assistant message", f"roles {roles}")
    if prompt[-1]["role"] == "assistant":
        raise Refused("the prompt ends with an assistant message, wanted a user message last")
    return prompt, chosen, rejected


def _transcript(text: str) -> list[Message]:
    """Messages of an HH transcript; contents lose their outer whitespace."""
    pieces = _TURN.split(text if text.startswith("\n\n") else "\n\n" + text.lstrip("\n"))
    if len(pieces) == 1 or pieces[0].strip():
        raise Refused(
            "no prompt: wanted a prompt column, message lists, or transcripts that begin with "
            "'\\n\\nHuman: '"
        )
    turns = zip(pieces[1::2], pieces[2::2], strict=True)
    return [{"role": _ROLES[who], "content": content.strip()} for who, content in turns]


def _side(record: Mapping[str, Any], column: str) -> Side:
    if column not in record:
        raise Refused(f"the row has no {column!r}")
    value = record[column]
    if isinstance(value, str):
        _check_text(value, column)
        return str(value)
    if hasattr(value, "tolist") and not isinstance(value, Mapping):
        value = value.tolist()  # pandas reads lists from parquet as numpy arrays
    if isinstance(value, list | tuple):
        return [_message(message, column) for message in value]
    raise Refused(f"{column} is {_kind(value)}, wanted text or a message list")


def _message(message: Any, column: str) -> Message:
    if not isinstance(message, Mapping):
        raise Refused(
            f"{column} is a list of {_kind(message)}, wanted text or a list of messages "
            '{"role", "content"}'
        )
    if message.get("tool_calls"):
        raise Refused(f"a message in {column} has tool calls, which are not supported")
    role, content = message.get("role"), message.get("content")
    if isinstance(content, list | tuple) and all(_is_text_part(part) for part in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(role, str) or not isinstance(content, str):
        keys = ", ".join(str(key) for key in message)
        raise Refused(f"a message in {column} without text in role and content", f"keys {keys}")
    _check_text(content, column)
    _check_text(role, column)
    return {"role": role, "content": content}


def _is_text_part(part: Any) -> bool:
    return (
        isinstance(part, Mapping)
        and part.get("type") == "text"
        and isinstance(part.get("text"), str)
    )


def _check_text(text: str, column: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Refused(
            f"{column} holds a lone surrogate or a byte that is not UTF-8",
            f"character {error.start}: {text[error.start]!a}",
        ) from None


def _text(side: Side) -> str:
    return side if isinstance(side, str) else "".join(message["content"] for message in side)


def _is_given(value: Any) -> bool:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return False
    return len(value) > 0 if hasattr(value, "__len__") else True


def _kind(value: Any) -> str:
    if value is None:
        return "None"
    if isinstance(value, float) and math.isnan(value):
        return "NaN (an empty cell)"
    if isinstance(value, bool):
        return "a truth value"
    if isinstance(value, int | float):
        return f"a number ({type(value).__name__})"
    return f"a {type(value).__name__}"
