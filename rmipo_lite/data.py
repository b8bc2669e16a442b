"""Any preference dataset -> rows {prompt, chosen, rejected}, every row accounted for.

Three shapes come in: plain text, message lists, and whole conversations with the prompt inside
(message lists, or "\\n\\nHuman: ...\\n\\nAssistant: ..." transcripts). They leave as `Row`s in one
of two forms: text, or messages. What is wrong with the dataset as a whole (columns, file, zero
rows) raises ValueError with the way out; what is wrong with one row is counted in the
`DataReport`, with its reason, and the rest goes on, since one bad line in fifty thousand should
not end an evening's run. Rows are never repaired by guessing.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import random
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from rmipo_lite.data_files import Broken
from rmipo_lite.data_report import DataReport, name_rows, printable
from rmipo_lite.data_rows import Dropped, Identical, Refused, normalise
from rmipo_lite.data_sources import read_records

__all__ = ["DataReport", "Row", "load_rows", "split_holdout"]

Message = dict[str, str]  # {"role": ..., "content": ...}
COLUMNS = ("prompt", "chosen", "rejected")
COLUMNS_READ = {*COLUMNS, "tools"}  # tools only to refuse them by name
COLUMNS_NAMED = 20  # columns that the error about wrong ones names
MIN_PAIRS_TO_HOLD_OUT = 8  # fewer pairs are too few to lose any
# What other people call these columns; only for naming the rename in an error.
ALIASES = {
    "prompt": "question instruction input query user context problem source post ask human x",
    "chosen": "good preferred better winner win won positive pos accepted accept best response_j "
    "correct yw",
    "rejected": "bad dispreferred unpreferred worse loser lose lost negative neg reject worst "
    "response_k incorrect wrong yl",
}
NEGATIONS = {"non", "not", "less", "un", "dis"}  # non_preferred is a name of the rejected side


@dataclass(frozen=True, slots=True)
class Row:
    """One preference pair after normalising: three texts, or three message lists."""

    index: int  # 0-based position in the user's dataset
    prompt: str | list[Message]
    chosen: str | list[Message]  # a message list holds exactly one assistant message
    rejected: str | list[Message]


def load_rows(
    dataset: Any, *, split: str = "train", argument: str = "dataset"
) -> tuple[list[Row], DataReport]:
    """Read any preference dataset.

    Args:
        dataset: hub name; path (.jsonl .json .csv .tsv .parquet, also .gz, or a folder);
            `datasets.Dataset`, `DatasetDict`, `IterableDataset`; list of dicts; dict of lists;
            pandas DataFrame; any finite iterable of dicts.
        split: which split of a dataset that has several.
        argument: what the caller calls it, for errors.

    Returns:
        The usable rows in order, and the report, for which kept + dropped + refused == total.

    Raises:
        ValueError: no rows, wrong columns, an unreadable file, or no usable row at all.
        FileNotFoundError: a path that does not exist.
    """
    try:
        source, records = read_records(dataset, split)
        if not records:
            raise ValueError(f"dataset: {source} has no rows, wanted at least one pair")
        report = DataReport(source=source, total=len(records), argument=argument)
        _check_columns(records, report)
    except (ValueError, FileNotFoundError) as error:
        if argument == "dataset":
            raise
        raise type(error)(argument + str(error).removeprefix("dataset")) from error
    rows: list[Row] = []
    seen: set[tuple[bytes, ...]] = set()
    for index, record in enumerate(records):
        try:
            if isinstance(record, Broken):
                raise Refused("row", record.wanted, record.got, record.where)
            row = Row(index, *normalise(record))
        except Refused as problem:
            report.refuse(index, problem.reason, problem.example)
        except Dropped as problem:
            report.drop(index, problem.reason, problem.example)
            report.identical_pairs += isinstance(problem, Identical)
        else:
            rows.append(row)
            _count_texts(row, seen, report)
    report.kept = len(rows)
    report.distinct_prompts = len({key[0] for key in seen})
    report.check()
    if not rows:
        raise ValueError(nothing_left(report))
    return rows, report


def _count_texts(row: Row, seen: set[tuple[bytes, ...]], report: DataReport) -> None:
    """Duplicates, and text responses that repeat their prompt."""
    key = tuple(_digest(_key(side)) for side in (row.prompt, row.chosen, row.rejected))
    report.duplicate_rows += key in seen
    seen.add(key)
    prompt, chosen, rejected = row.prompt, row.chosen, row.rejected
    if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
        report.responses_repeating_prompt += (
            len(prompt) > 20 and chosen.startswith(prompt) and rejected.startswith(prompt)
        )


def _digest(text: str) -> bytes:
    """A text that is only compared: a second copy of every text would double the memory."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _key(side: str | list[Message]) -> str:
    return side if isinstance(side, str) else json.dumps(side)


def nothing_left(report: DataReport) -> str:
    """The message for a dataset without one usable row: the three most frequent reasons."""
    reasons = {**report.refused, **report.dropped}
    lines = [
        f"  {tally.count} rows ({name_rows(tally.numbers())}): {printable(reason)}"
        + (f" ({tally.example})" if tally.example else "")
        for reason, tally in sorted(reasons.items(), key=lambda item: -item[1].count)[:3]
    ]
    return (
        f"{report.argument}: no usable row among the {report.total} of {report.source}:\n"
        + "\n".join(lines)
        + "\nWanted rows with prompt, chosen and rejected: texts, or message lists "
        '[{"role": "user", "content": "..."}].'
    )


def _check_columns(records: list[Any], report: DataReport) -> None:
    """Refuse a dataset whose columns can't be right, naming the likely rename."""
    columns: dict[str, None] = {}
    for record in records:
        if isinstance(record, Mapping):
            columns.update(dict.fromkeys(str(name) for name in record))
    if not columns:
        return  # every row is faulty: the reasons are told by nothing_left
    has_prompt_inside = {"chosen", "rejected"} <= columns.keys() and any(
        _prompt_inside(record.get("chosen")) for record in records if isinstance(record, Mapping)
    )
    missing = [name for name in COLUMNS if name not in columns]
    if has_prompt_inside and missing == ["prompt"]:
        missing = []
    report.ignored_columns = [name for name in columns if name not in COLUMNS_READ]
    if missing:
        raise ValueError(_wrong_columns(list(columns), missing))


def _prompt_inside(chosen: Any) -> bool:
    if isinstance(chosen, str):
        return "\n\nHuman:" in chosen
    return (
        not isinstance(chosen, str | Mapping) and chosen is not None and hasattr(chosen, "__len__")
    )


def _wrong_columns(found: list[str], missing: list[str]) -> str:
    free = [name for name in found if name not in COLUMNS]
    renames: dict[str, str] = {}
    for wanted in missing:
        name = _nearest(wanted, [name for name in free if name not in renames])
        if name is not None:
            renames[name] = wanted
    named = ", ".join(repr(name[:60]) for name in found[:COLUMNS_NAMED])
    more = f", ... ({len(found)} in all)" if len(found) > COLUMNS_NAMED else ""
    message = (
        f"dataset: columns found [{named}{more}], wanted ['prompt', 'chosen', 'rejected'] "
        "(prompt may be missing when chosen and rejected are whole conversations); "
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


Pair = TypeVar("Pair")


def split_holdout(
    pairs: Sequence[Pair], share: float = 0.05, at_most: int = 200, seed: int = 0
) -> tuple[list[Pair], list[Pair]]:
    """(train, held out), no prompt in both; the same for the same input and seed.

    Prompts are drawn at random and taken with all their pairs while they fit into
    min(at_most, share * len(pairs)), rounded, at least one. Below eight pairs, or with one prompt
    alone, nothing is held out. Takes `Row`s or `TokenizedPair`s; keeps their order.
    """
    if not 0 <= share < 1:
        raise ValueError(f"share: wanted a number from 0 up to 1, got {share}")
    groups: dict[Any, list[int]] = defaultdict(list)
    for position, pair in enumerate(pairs):
        groups[_prompt_key(pair)].append(position)
    if share == 0 or at_most == 0 or len(pairs) < MIN_PAIRS_TO_HOLD_OUT or len(groups) < 2:
        return list(pairs), []
    room = min(at_most, max(1, round(share * len(pairs))))
    drawn = list(groups.values())
    random.Random(seed).shuffle(drawn)
    held: set[int] = set()
    for positions in drawn:
        if len(held) + len(positions) <= room:
            held.update(positions)
    train = [pair for position, pair in enumerate(pairs) if position not in held]
    return train, [pair for position, pair in enumerate(pairs) if position in held]


def _prompt_key(pair: Any) -> Any:
    if isinstance(pair, Row):
        return _key(pair.prompt)
    return tuple(pair.prompt_ids)
