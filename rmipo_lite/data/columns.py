"""Which columns a dataset has, and which it should have: the likely rename is named, never done."""

import difflib
import re
from collections.abc import Mapping
from typing import Any

from rmipo_lite.data.normalise import SYSTEM_COLUMNS
from rmipo_lite.data.report import DataReport

COLUMNS = ("prompt", "chosen", "rejected")


UNPAIRED_COLUMNS = ("prompt", "completion", "label")


COLUMNS_READ = {*COLUMNS, *SYSTEM_COLUMNS, "tools"}  # tools only to refuse them by name


COLUMNS_NAMED = 20  # columns that the error about wrong ones names


# What other people call these columns; only for naming the rename in an error.
ALIASES = {
    "prompt": "question instruction input query user context problem source post ask human x",
    "chosen": "good preferred better winner win won positive pos accepted accept best response_j "
    "correct yw",
    "rejected": "bad dispreferred unpreferred worse loser lose lost negative neg reject worst "
    "response_k incorrect wrong yl",
    "completion": "response answer output text reply generation",
    "label": "labels desirable is_good good liked thumbs_up score rating",
}


NEGATIONS = {"non", "not", "less", "un", "dis"}  # non_preferred is a name of the rejected side


def check_columns(records: list[Any], report: DataReport, unpaired: bool = False) -> bool:
    """Refuse a dataset whose columns can't be right, naming the likely rename.

    Returns whether the rows are unpaired (prompt, completion, label), which is refused too unless
    such are wanted; pairs may stand in their place.
    """
    columns: dict[str, None] = {}
    for record in records:
        if isinstance(record, Mapping):
            columns.update(dict.fromkeys(str(name) for name in record))
    if not columns:
        return False  # every row is faulty: the reasons are told by nothing_left
    is_paired = {"chosen", "rejected"} <= columns.keys()
    is_unpaired = not is_paired and (unpaired or {"completion", "label"} <= columns.keys())
    wanted = UNPAIRED_COLUMNS if is_unpaired else COLUMNS
    has_prompt_inside = {*wanted[1:]} <= columns.keys() and any(
        _prompt_inside(record.get(wanted[1])) for record in records if isinstance(record, Mapping)
    )
    missing = [name for name in wanted if name not in columns]
    if has_prompt_inside and missing == ["prompt"]:
        missing = []
    if is_unpaired and not unpaired:
        raise ValueError(
            "dataset: rows of prompt, completion and label are unpaired, and loss_type='kto' alone "
            "trains on such; wanted ['prompt', 'chosen', 'rejected']"
        )
    known = (*COLUMNS_READ, *wanted, *report.ignored_columns)
    report.ignored_columns += [name for name in columns if name not in known]
    if missing:
        raise ValueError(_wrong_columns(list(columns), missing, wanted))
    return is_unpaired


def _prompt_inside(chosen: Any) -> bool:
    if isinstance(chosen, str):
        return "\n\nHuman:" in chosen
    return (
        not isinstance(chosen, str | Mapping) and chosen is not None and hasattr(chosen, "__len__")
    )


def _wrong_columns(found: list[str], missing: list[str], wanted_all: tuple[str, ...]) -> str:
    free = [name for name in found if name not in wanted_all]
    renames: dict[str, str] = {}
    for wanted in missing:
        name = _nearest(wanted, [name for name in free if name not in renames])
        if name is not None:
            renames[name] = wanted
    named = ", ".join(repr(name[:60]) for name in found[:COLUMNS_NAMED])
    more = f", ... ({len(found)} in all)" if len(found) > COLUMNS_NAMED else ""
    others = " and ".join(wanted_all[1 : 3 if wanted_all is COLUMNS else 2])
    message = (
        f"dataset: columns found [{named}{more}], wanted {list(wanted_all)} "
        f"(prompt may be missing when {others} are whole conversations); "
        f"missing {missing}."
    )
    if renames:
        pairs = ", ".join(f'"{old}": "{new}"' for old, new in renames.items())
        message += f" Nearest match: dataset.rename_columns({{{pairs}}})"
    return message


def _nearest(wanted: str, names: list[str]) -> str | None:
    """The column that most likely is the wanted one, by its name; None where none looks like it."""
    aliases = _aliases(wanted)
    lowered = {name.lower().strip(): name for name in reversed(names)}
    for alias in aliases:
        if alias in lowered:
            return lowered[alias]
    negated = _aliases("chosen") if wanted == "rejected" else []
    for alias in (*aliases, *negated):
        for name in names:
            if alias in _words(name) and _meaning(_words(name)) == wanted:
                return name
    close = difflib.get_close_matches(wanted, list(lowered), n=1, cutoff=0.6)
    return lowered[close[0]] if close else None


def _aliases(column: str) -> list[str]:
    return [column, *ALIASES[column].split()]


def _words(name: str) -> set[str]:
    """The words of snake_case and camelCase."""
    return set(re.findall("[a-z0-9]+", re.sub("(?<=[a-z])(?=[A-Z])", " ", name).lower()))


def _meaning(words: set[str]) -> str:
    """Which column a name of these words is: answer_correct is chosen, non_preferred rejected."""
    if words & set(_aliases("rejected")):
        return "rejected"
    if words & set(_aliases("chosen")):
        return "rejected" if words & NEGATIONS else "chosen"
    return "prompt"
