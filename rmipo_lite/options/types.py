"""A value against the annotation of its option, and the annotation in words."""

import enum
import os
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import numpy as np

_IN_WORDS = {
    float: "a number", int: "a whole number", bool: "True or False", type(None): "None",
    dict: "a dict", list: "a list", str: "a text",
}  # fmt: skip


def plain(value: Any) -> Any:
    """A number of numpy's, also in a dict, as Python's own: JSON and seeds take no other."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    kinds: tuple[tuple[type, Any], ...] = ((np.bool_, bool), (Integral, int), (Real, float))
    for kind, own in kinds:
        if isinstance(value, kind) and not isinstance(value, bool):
            return own(value)
    return value


def union_members(hint: Any) -> tuple[Any, ...]:
    """The types a value may have: the members of a union, or the one type."""
    if get_origin(hint) in (Union, UnionType):
        return tuple(member for part in get_args(hint) for member in union_members(part))
    return (hint,)


def is_a(value: object, kind: Any) -> bool:
    """Whether a value has the type; no truth value counts as a number, a path does as a text."""
    if get_origin(kind) is Literal:
        return any(value is known or value == known != 0 for known in get_args(kind))
    if kind in (int, float):
        number = Integral if kind is int else Real
        return isinstance(value, number) and not isinstance(value, bool)
    if kind is str:
        return isinstance(value, str | os.PathLike)
    if get_origin(kind) is list:
        kinds = union_members(get_args(kind)[0])
        return isinstance(value, list) and all(any(is_a(i, k) for k in kinds) for i in value)
    return isinstance(value, get_origin(kind) or kind)


def enum_values(kind: Any) -> list[Any]:
    """What the members of an enum stand for."""
    return [member.value for member in kind]


def in_words(kinds: tuple[Any, ...]) -> str:
    """What the types are, for an error; of a text that names an enum's member, the enum alone."""
    has_enum = any(isinstance(kind, enum.EnumMeta) for kind in kinds)
    shown = [kind for kind in kinds if not (has_enum and kind is str)]
    return " or ".join(dict.fromkeys(map(_kind_in_words, shown)))


def _kind_in_words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        names = get_args(kind)
        return repr(names[0]) if len(names) == 1 else "one of " + ", ".join(map(str, names))
    if isinstance(kind, enum.EnumMeta):
        return "one of " + ", ".join(map(str, enum_values(kind)))
    kind = get_origin(kind) or kind
    return _IN_WORDS.get(kind, getattr(kind, "__name__", str(kind)))
