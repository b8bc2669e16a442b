"""Messages that a container flattened: as text in a cell, or a dict of lists for a list of dicts.

CSV cells and many parquet files hold a message list as JSON or as Python's own form of it; arrow
gives a list of structs as one dict of lists. Both are read as the messages they are. Forms that
are refused as lists and dicts are refused as text too, and never trained on as text. What the
majority of a column's texts is, the whole column is: a row that differs is refused, since it would
be trained on as something else than its neighbours.
"""

import ast
import contextlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from rmipo_lite.data.files import Broken

_FIELDS = ("role", "content")
# Cheap, so that ordinary texts aren't parsed; no backtracking, since texts come from strangers.
_BEGINS = re.compile(r"""["']?+\s*+(\[?+)\s*+\{\s*+\\?+["']""")
_KEY = re.compile(r"""["'](\w{4,8})\\?["']\s*+:""")
_CHATS = ({"role", "content"}, {"from", "value"}, {"messages"})  # keys, in small letters
_OF_A_COLUMN = ("prompt", "chosen", "rejected", "completion")


def unflatten(records: list[Any]) -> list[str]:
    """Turn such cells of these records into message lists; returns the columns that held texts.

    Records are changed in copies, in the list; one that differs from its column becomes `Broken`.
    """
    columns = [name for name in _OF_A_COLUMN if _read_column(records, name)]
    for index, record in enumerate(records):
        if isinstance(record, Mapping):
            lists = {n: _rows_of(record[n]) for n in _OF_A_COLUMN if _is_transposed(record.get(n))}
            if lists:
                records[index] = {**record, **lists}
    return columns


def _read_column(records: list[Any], name: str) -> bool:
    """Read a column of texts as messages where most are; whether it was one."""
    rows = [
        (index, record[name])
        for index, record in enumerate(records)
        if isinstance(record, Mapping) and isinstance(record.get(name), str)
    ]
    found = {index: _chat_in(text) for index, text in rows}
    is_messages = sum(chat is not None for chat in found.values()) * 2 > len(rows)
    for index, text in rows:
        chat = found[index]
        if is_messages and chat:
            records[index] = {**records[index], name: chat}
        elif is_messages:
            got = "another text" if chat is None else "a text that can't be read so"
            records[index] = Broken(
                f"messages as JSON text in {name}, as in the other rows", got, text[:60]
            )
        elif chat:
            wanted = f"text in {name}, as in the other rows"
            records[index] = Broken(wanted, "messages as JSON text", text[:60])
    return is_messages


def _chat_in(text: str) -> Any:
    """The list or dict of a text that holds messages of any kind, in JSON or in Python's form.

    None for an ordinary text, an empty list for messages that can't be read.
    """
    text = text.lstrip("\ufeff \t\r\n")
    begins = _BEGINS.match(text)
    if begins is None or not _has_keys(_KEY.findall(text)):
        return None
    value = _parsed(text)
    if isinstance(value, str):  # encoded twice
        value = _parsed(value)
    if value is None:
        return [] if begins[1] else None
    messages = value if isinstance(value, list) else [value]
    return value if any(isinstance(m, dict) and _has_keys(m) for m in messages) else None


def _parsed(text: str) -> Any:
    """The value of a text in JSON or in Python's form; None where it is neither."""
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            return read(text.strip())
    return None


def _has_keys(keys: Iterable[Any]) -> bool:
    lowered = {str(key).lower() for key in keys}
    return any(chat <= lowered for chat in _CHATS)


def _is_transposed(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        not isinstance(value.get(name), str) and hasattr(value.get(name), "__len__")
        for name in _FIELDS
    )


def _rows_of(columns: Mapping[str, Any]) -> Any:
    """A list of dicts of a dict of lists; as it came where the lists are of unequal length."""
    lists = {name: list(values) for name, values in columns.items() if hasattr(values, "__len__")}
    if len({len(values) for values in lists.values()}) != 1:
        return columns
    return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]
