"""From the fields of `RMiPOConfig` to command-line options and back: names, help, conversion.

The field's text is the help and its annotation decides how a word is read, so an option is
described once, in config.py.
"""

import argparse
import difflib
import json
import typing
from collections.abc import Iterable
from dataclasses import MISSING, Field, fields
from enum import Enum
from pathlib import Path
from typing import Any

_YES, _NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
# fields of the config that `train` takes itself, or that share a name with an option of ours
HANDLED_APART = ("output_dir", "debug")


class UsageError(Exception):
    """The command line or the options file is wrong; the message says what and how."""


def _plain(kind: Any) -> Any:
    """A type as a word is read: what it is of, and text for one of a few words."""
    origin = typing.get_origin(kind)
    return str if origin is typing.Literal else origin or kind


def _names(kinds: Iterable[Any]) -> str:
    return " or ".join(
        "none" if k is type(None) else getattr(_plain(k), "__name__", str(k)) for k in kinds
    )


def convert(text: str, hint: Any) -> Any:
    """Read a word as a value of the type `hint`; raises ValueError saying what was wanted."""
    from rmipo_lite.options.types import union_members

    kinds = [_plain(k) for k in union_members(hint)]
    low = text.strip().lower()
    if type(None) in kinds and low in ("none", "null", ""):
        return None
    if bool in kinds and low in _YES + _NO:
        return low in _YES
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError:
                continue
    if (dict in kinds or list in kinds) and low[:1] in "[{":
        return json.loads(text)
    if any(k is str or k is Any for k in kinds):
        return text
    if any(isinstance(k, type) and issubclass(k, Enum) for k in kinds):
        return text  # transformers turns it into the member, or names the members
    if list in kinds:
        return [part.strip() for part in text.split(",")]
    raise ValueError(f"wanted {_names(kinds)}, got {text!r}")


def config_fields() -> dict[str, tuple[Field[Any], Any]]:
    """Every option of the config: name -> (field, type)."""
    from rmipo_lite.config import RMiPOConfig

    hints = typing.get_type_hints(RMiPOConfig)
    return {
        f.name: (f, hints[f.name])
        for f in fields(RMiPOConfig)
        if f.init and f.name not in HANDLED_APART
    }


def _default_text(option: Field[Any]) -> str:
    if option.default is not MISSING and not callable(option.default):
        value = option.default.value if isinstance(option.default, Enum) else option.default
        return "" if value is None else f" (default: {value})"
    return ""


def add_config_options(parser: argparse.ArgumentParser, *, show_all: bool) -> None:
    """Add an option for every field: ours shown first, transformers' hidden unless `show_all`."""
    from rmipo_lite.config import own_option_names
    from rmipo_lite.options.types import union_members

    known = config_fields()
    own = [name for name in own_option_names() if name in known]
    ours = parser.add_argument_group("options of the run")
    theirs = parser.add_argument_group("options of transformers.TrainingArguments")
    for name in [*own, *(n for n in known if n not in own)]:
        option, hint = known[name]
        text = str(option.metadata.get("help", "")) + _default_text(option)
        shown = " ".join(text.split()).replace("%", "%%")
        visible = name in own or show_all
        kinds = [_plain(k) for k in union_members(hint)]
        group = ours if name in own else theirs
        settings: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "type": str}
        if bool in kinds:
            settings |= {"nargs": "?", "const": "true"}
        metavar = _names(k for k in kinds if k is not type(None)).replace(" or ", "|").upper()
        group.add_argument(
            f"--{name}",
            metavar=metavar or "VALUE",
            help=shown if visible else argparse.SUPPRESS,
            **settings,
        )
        if "_" in name:  # --gradient-checkpointing works as --gradient_checkpointing does
            parser.add_argument(f"--{name.replace('_', '-')}", help=argparse.SUPPRESS, **settings)


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean x?)` for a misspelt name, empty when nothing is near."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""


def read_options_file(path: str, own_names: Iterable[str]) -> dict[str, Any]:
    """Options of a YAML file, keys checked against the config's and `own_names`.

    Raises UsageError for an unknown key (with the nearest known one) or a file that isn't a
    mapping; OSError when it can't be read.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UsageError(f"--config {path}: not readable as YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"--config {path}: wanted 'option: value' lines, got a {_kind(content)}")
    own = list(own_names)
    known = [*config_fields(), *own]
    options: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise UsageError(f"--config {path}: unknown option {key!r}{nearest(name, known)}")
        options[name] = value
    return options


def _kind(value: object) -> str:
    return type(value).__name__


def read_values(options: dict[str, Any]) -> dict[str, Any]:
    """Texts (from the command line, or YAML's `1e-5`, which it reads as a text) as typed values."""
    known = config_fields()
    values = {}
    for name, value in options.items():
        # a text that is the default stays one: report_to "none" is not None
        if name in known and isinstance(value, str) and value != known[name][0].default:
            try:
                value = convert(value, known[name][1])
            except ValueError as error:
                raise UsageError(f"--{name}: {error}") from error
        values[name] = value
    return values
