"""Any preference dataset -> rows {prompt, chosen, rejected}, every row accounted for.

Three shapes come in: plain text, message lists, and whole conversations with the prompt inside
(message lists, or "\\n\\nHuman: ...\\n\\nAssistant: ..." transcripts). They leave as `Row`s in one
of two forms: text, or messages. What is wrong with the dataset as a whole (columns, file, zero
rows) raises ValueError with the way out; what is wrong with one row is counted in the
`DataReport`, with its reason, and the rest goes on, since one bad line in fifty thousand should
not end an evening's run. Rows are never repaired by guessing.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from rmipo_lite.data.cells import unflatten
from rmipo_lite.data.columns import check_columns
from rmipo_lite.data.files import Broken
from rmipo_lite.data.mixture import file_name, mixture_source, read_parts, rows_of_parts
from rmipo_lite.data.normalise import (
    Dropped,
    Identical,
    Refused,
    Side,
    normalise,
    system_of,
)
from rmipo_lite.data.report import DataReport, name_rows, shortened
from rmipo_lite.data.unpaired import LEAST_ROWS, halves, mismatched, normalise_unpaired, whole_of

Texts = tuple[str, str, str]  # prompt, chosen, rejected
_MIN_PROMPT = 20  # characters from which repeating the prompt is no chance


@dataclass(frozen=True, slots=True)
class Row:
    """One preference pair after normalising: three texts, or three message lists.

    With a label it is an unpaired row (`data.unpaired`), of which one side is its own.
    """

    index: int  # 0-based position in the user's dataset; of unpaired pairs twice that, and one more
    prompt: Side
    chosen: Side  # a message list holds exactly one assistant message
    rejected: Side
    label: bool | None = None
    subset: str = ""  # what the row says it belongs to, in a column of that name

    @property
    def responses(self) -> dict[str, Side]:
        """The row's own responses by the name of their side."""
        sides = {"chosen": self.chosen, "rejected": self.rejected}
        if self.label is None:
            return sides
        name = "chosen" if self.label else "rejected"
        return {name: sides[name]}


class LoadedRows(NamedTuple):
    """What `load_rows` gives."""

    rows: list[Row]
    report: DataReport


def load_rows(
    dataset: Any,
    *,
    split: str | None = None,
    argument: str = "dataset",
    as_messages: bool = False,
    unpaired: bool = False,
) -> LoadedRows:
    """Read any preference dataset.

    Args:
        dataset: hub name; path (.jsonl .json .csv .tsv .parquet, also .gz, or a folder);
            `datasets.Dataset`, `DatasetDict`, `IterableDataset`; list of dicts; dict of lists;
            pandas or polars DataFrame, arrow table; any finite iterable of dicts. Several at once
            as a list of names or paths, or of (dataset, share) pairs.
        split: which split of a dataset that has several; None takes train, or the only one.
        argument: what the caller calls it, for errors.
        as_messages: make messages of texts, as a system column does.
        unpaired: rows of prompt, completion and label are wanted; a pair becomes two of them.

    Returns:
        The usable rows in order, and the report, for which kept + dropped + refused == total.

    Raises:
        ValueError: no rows, wrong columns, an unreadable file, or no usable row at all.
        FileNotFoundError: a path that does not exist.
    """
    try:
        parts = read_parts(dataset, split)
        source = mixture_source(parts)
        shown = [part._replace(source=file_name(part.source)) for part in parts]
        report = DataReport(
            source=source, shown_source=mixture_source(shown), argument=argument,
            read_as=rows_of_parts(shown),
        )  # fmt: skip
        records: list[Any] = []
        for part in parts:  # each has columns of its own
            if as_text := unflatten(part.records):
                report.read_as.append(f"{', '.join(as_text)}: messages that stand there as text")
            is_unpaired = check_columns(part.records, report, unpaired)
            records += part.records if is_unpaired or not unpaired else halves(part.records)
            if unpaired and not is_unpaired:
                report.read_as.append("chosen and rejected: two rows each, desirable or not")
        report.total = len(records)
        if not records:
            raise ValueError(f"dataset: {source} has no rows, wanted at least one pair")
    except (ValueError, FileNotFoundError) as error:
        if argument == "dataset":
            raise
        raise type(error)(argument + str(error).removeprefix("dataset")) from error
    report.has_system = any(system_of(whole_of(record)) for record in records)
    if report.has_system:
        report.read_as.append("system: the system message in front of the prompt")
    rows: list[Row] = []
    seen: set[tuple[bytes, ...]] = set()
    for index, record in enumerate(records):
        try:
            row = _row(index, record, as_messages or report.has_system, unpaired)
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
    if unpaired and len(rows) < LEAST_ROWS:
        raise ValueError(nothing_left(report, "at least two rows with prompt, completion, label"))
    if not rows:
        raise ValueError(nothing_left(report))
    if unpaired:
        rows = _with_mismatched(rows)
    return LoadedRows(rows, report)


def _row(index: int, record: Any, as_messages: bool, unpaired: bool) -> Row:
    whole = whole_of(record)
    if isinstance(whole, Broken):
        raise Refused("row", whole.wanted, whole.got, whole.where)
    subset = _subset(whole)
    if not unpaired:
        return Row(index, *normalise(record, as_messages), subset=subset)
    prompt, completion, label = normalise_unpaired(record, as_messages)
    return Row(index, prompt, completion, completion, label, subset)


def _subset(record: Any) -> str:
    """A row's own word for where it belongs; missing values, also a table's NaN, are none."""
    value = record.get("subset") if isinstance(record, Mapping) else None
    if value is None or value != value:
        return ""
    whole = isinstance(value, float) and value.is_integer()  # a column of ints with a gap
    return str(int(value) if whole else value)


def _with_mismatched(rows: list[Row]) -> list[Row]:
    found = mismatched([row.prompt for row in rows], [row.chosen for row in rows])
    return [
        replace(row, rejected=other) if row.label else replace(row, chosen=other)
        for row, other in zip(rows, found, strict=True)
    ]


def _count_texts(row: Row, seen: set[tuple[bytes, ...]], report: DataReport) -> None:
    """Duplicates, and pairs both of whose responses repeat their prompt."""
    key = tuple(map(digest, texts_of(row)))
    report.duplicate_rows += key in seen
    seen.add(key)
    if row.label is not None:
        report.desirable += row.label
        report.undesirable += not row.label
    report.responses_repeating_prompt += len(repeating_prompt(row)) == 2


def texts_of(row: Row) -> Texts:
    """Prompt, chosen and rejected as plain texts; messages joined by newlines.

    Of an unpaired row the side that isn't its own is empty.
    """
    chosen, rejected = row.chosen, row.rejected
    if row.label is not None:
        chosen, rejected = (chosen, "") if row.label else ("", rejected)
    return _text_of(row.prompt), _text_of(chosen), _text_of(rejected)


def _text_of(side: Side) -> str:
    if isinstance(side, str):
        return side
    return "\n".join([message["content"] for message in side])


def digest(text: str) -> bytes:
    """What stands for a text that is only compared, 16 bytes; whitespace doesn't count.

    A second copy of every text would double the memory.
    """
    folded = " ".join(text.split()).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(folded, digest_size=16).digest()


def repeating_prompt(row: Row) -> list[str]:
    """The responses that begin with their prompt; of messages, with the last question."""
    asked = (row.prompt if isinstance(row.prompt, str) else row.prompt[-1]["content"]).strip()
    if len(asked) <= _MIN_PROMPT:
        return []
    return [text for text in texts_of(row)[1:] if text.lstrip().startswith(asked)]


def nothing_left(report: DataReport, wanted: str = "rows with prompt, chosen and rejected") -> str:
    """The message for a dataset without one usable row: the three most frequent reasons."""
    reasons = {**report.refused, **report.dropped}
    lines = [
        f"  {tally.count} rows ({name_rows(tally.numbers())}): {shortened(reason)}"
        + (f" ({tally.example})" if tally.example else "")
        for reason, tally in sorted(reasons.items(), key=lambda item: -item[1].count)[:3]
    ]
    some = f"only {report.kept}" if report.kept else "no"
    return (
        f"{report.argument}: {some} usable row among the {report.total} of {report.source}:\n"
        + "\n".join(lines)
        + f"\nWanted {wanted}: texts, or message lists "
        '[{"role": "user", "content": "..."}].'
    )
