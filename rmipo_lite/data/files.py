"""One file of preference rows -> a list of records, faulty records included.

Files are read here and not through `datasets`, because files come from strangers: lines have a
limit, gzip is recognised by its magic and its expansion is limited, a broken line costs that line
alone, and nothing is ever evaluated or unpickled. A record that could not be read is a `Broken` in
its place, so that row numbers stay.
"""

import csv
import gzip
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

MAX_LINE_BYTES = 16 * 2**20  # one JSON line, one line of a CSV file
MAX_FILE_BYTES = 4 * 2**30  # a JSON document, a parquet file and what it expands to
MAX_GZIP_RATIO = 200  # plain text reaches about 20
GZIP_FREE_BYTES = 256 * 2**20  # below this no ratio is asked for
PARQUET_BATCH_ROWS = 1024
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_CSV_PREAMBLE = re.compile(r"(sep=.)?\s*+", re.IGNORECASE)  # a spreadsheet's hint, a blank line
_CSV_KNOWN = {"prompt", "chosen", "rejected"}
_JSON_LINE = "a line that holds one JSON object"


@dataclass(frozen=True, slots=True)
class Broken:
    """A record that could not be read: what was wanted, what came, and where."""

    wanted: str
    got: str
    where: str


class _SameKey(ValueError):
    """An object that has one key twice: two values, and nobody knows which is meant."""


class _MoreFollows(Exception):
    """Behind a whole JSON value there is more: not one document but lines."""


def read_file(path: Path) -> list[Any]:
    """The records of a file of one of SUFFIXES, also compressed with gzip.

    Raises:
        ValueError: it can't be read as what its name says, or is larger than the limits.
    """
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    try:
        with _open(path) as file:
            if suffix == ".parquet":
                return _read_parquet(file)
            if suffix in (".csv", ".tsv"):
                return _read_csv(file, _delimiter(file, "\t" if suffix == ".tsv" else ","))
            if suffix in (".jsonl", ".ndjson", ".json"):
                return _read_json(file)
    except (OSError, EOFError) as error:  # a cut or damaged gzip, no permission
        raise ValueError(
            f"dataset: {path} can't be read ({type(error).__name__}: {error})"
        ) from error
    except _Unreadable as error:
        raise ValueError(f"dataset: {path}: {error}") from error.__cause__
    raise ValueError(
        f"dataset: {path} ends in {suffix!r}; wanted one of {', '.join(SUFFIXES)} (also .gz)"
    )


class _Unreadable(Exception):
    """What is wrong with the file as a whole."""


class _LimitedReader(io.RawIOBase):
    """A decompressed stream that refuses to grow past MAX_GZIP_RATIO times its file."""

    def __init__(self, path: Path) -> None:
        self._stream = gzip.open(path)  # noqa: SIM115 - closed by close()
        self._left = max(GZIP_FREE_BYTES, MAX_GZIP_RATIO * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._stream.readinto(buffer)
        self._left -= count
        if self._left < 0:
            raise _Unreadable(
                f"it expands to more than {MAX_GZIP_RATIO} times its size; unpack it by hand if "
                "that is right"
            )
        return count

    def close(self) -> None:
        self._stream.close()
        super().close()


def _open(path: Path) -> IO[bytes]:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic[:2] == b"\x1f\x8b":
        return io.BufferedReader(_LimitedReader(path), 2**20)
    if magic[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise _Unreadable("it is UTF-16; save it as UTF-8")
    return path.open("rb")


def _read_whole(file: IO[bytes]) -> bytes:
    content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise _Unreadable(f"it has more than {MAX_FILE_BYTES} bytes; split it")
    return content


def _read_parquet(file: IO[bytes]) -> list[Any]:
    import pyarrow
    import pyarrow.parquet

    records: list[Any] = []
    size = 0
    try:
        table = pyarrow.parquet.ParquetFile(io.BytesIO(_read_whole(file)))
        # In small batches: a few kilobytes of one text repeated can expand to any size.
        for batch in table.iter_batches(batch_size=PARQUET_BATCH_ROWS):
            size += batch.nbytes
            if size > MAX_FILE_BYTES:
                raise _Unreadable(f"it expands to more than {MAX_FILE_BYTES} bytes; split it")
            records += batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise _Unreadable(f"not a readable parquet file ({str(error)[:300]})") from error
    return records


def _delimiter(file: Any, usual: str) -> str:
    """What separates the names in the header; spreadsheets write ";" where "," is in numbers."""
    head: bytes = file.peek(4096)
    text = io.StringIO(head.decode("utf-8-sig", "replace"), newline="")
    try:
        lines = list(_csv_lines(text))
        headers = {mark: next(csv.reader(lines, delimiter=mark), []) for mark in usual + ",;\t|"}
        known = {mark: len(_CSV_KNOWN & {*header}) for mark, header in headers.items()}
        best = max(known, key=known.__getitem__)
        return best if known[best] else csv.Sniffer().sniff(lines[0], ",;\t|").delimiter
    except (csv.Error, IndexError):  # one column, or none
        return usual


def _read_csv(file: IO[bytes], delimiter: str) -> list[Any]:
    # surrogateescape turns bad bytes into lone surrogates, which are refused row by row later.
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    limit = csv.field_size_limit(MAX_LINE_BYTES)
    try:
        rows = csv.DictReader(_csv_lines(text), delimiter=delimiter)
        names = list(filter(None, rows.fieldnames or []))
        if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
            raise _Unreadable(f"column {twice[0][:60]!r} is there twice, wanted each name once")
        return [_csv_record(number, row) for number, row in enumerate(rows)]
    except csv.Error as error:
        raise _Unreadable(f"not a readable CSV file ({error})") from error
    finally:
        csv.field_size_limit(limit)
        text.detach()


def _csv_lines(text: IO[str]) -> Iterator[str]:
    """The lines from the header on."""
    return itertools.dropwhile(_CSV_PREAMBLE.fullmatch, _limited_lines(text))


def _limited_lines(text: IO[str]) -> Iterator[str]:
    while line := text.readline(MAX_LINE_BYTES + 1):
        if len(line) > MAX_LINE_BYTES:
            raise csv.Error(f"a line longer than {MAX_LINE_BYTES} characters")
        yield line


def _csv_record(number: int, row: dict[str | Any, Any]) -> Any:
    """The row, unless it has more cells than the header: an unquoted comma moved its texts."""
    if None in row:
        cells = len(row) - 1 + len(row[None])
        wanted = f"{len(row) - 1} cells, as many as the header"
        return Broken(wanted, "more", f"row {number} has {cells}: a comma outside quotes?")
    return row


def _read_json(file: IO[bytes]) -> list[Any]:
    """JSON lines, or one JSON document (a list of dicts, a dict of lists), told by its start."""
    if _begins_a_list(file):
        content = _read_whole(file)
        try:
            return _document(content)
        except _MoreFollows:  # JSON lines, of which the first is a list
            file = io.BytesIO(content)
    lines = _lines(file)
    first = next(lines, None)
    if first is None:
        return []
    if first[1] == b"{":
        return _document(b"{" + _read_whole(file))
    second = next(lines, None)
    if second is None and _is_table(first[1]):
        return _document(first[1])
    start = [first] if second is None else [first, second]
    return [_parse_line(*line) for part in (start, lines) for line in part]


def _begins_a_list(file: Any) -> bool:
    """Whether the first character is "[", without taking it from the stream."""
    head: bytes = file.peek(4096)
    return head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def _is_table(line: bytes | Broken) -> bool:
    """Whether the only line of a file is a dict of lists, and not one row of message lists."""
    try:
        parsed = None if isinstance(line, Broken) else json.loads(line)
    except (ValueError, RecursionError):
        return False
    if not isinstance(parsed, dict) or not parsed:
        return False
    chosen = parsed.get("chosen")
    is_messages = isinstance(chosen, list) and bool(chosen) and isinstance(chosen[0], dict)
    return all(isinstance(value, list) for value in parsed.values()) and not is_messages


def _document(content: bytes | Broken) -> list[Any]:
    assert isinstance(content, bytes)
    try:
        document = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_record)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            raise _MoreFollows from error
        raise _not_a_document(error) from error
    except (ValueError, RecursionError) as error:
        raise _not_a_document(error) from error
    if isinstance(document, list):
        return document
    if not isinstance(document, dict):
        raise _Unreadable("the file holds one JSON value, wanted a list of objects or JSON lines")
    return transpose(document)


def _not_a_document(error: Exception) -> _Unreadable:
    return _Unreadable(f"neither JSON lines nor one JSON document ({str(error)[:200]})")


def transpose(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A dict of columns as a list of rows.

    Raises:
        ValueError: a column that is no list, or columns of unequal length.
    """
    lists: dict[str, list[Any]] = {}
    for name, column in columns.items():
        if isinstance(column, str | bytes | Mapping) or not isinstance(column, Iterable):
            raise ValueError(
                "dataset: a dict must map column names to lists of equal length; column "
                f"{str(name)[:60]!r} is {type(column).__name__}. Is it one row? Pass [row]"
            )
        lists[name] = list(column)
    lengths = {name: len(column) for name, column in lists.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"dataset: columns of unequal length: {str(lengths)[:300]}")
    rows = zip(*lists.values(), strict=True)
    return [dict(zip(lists, row, strict=True)) for row in rows]


def _lines(file: IO[bytes]) -> Iterator[tuple[int, bytes | Broken]]:
    """(1-based line number, line without its end) of every line that is not blank."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE_BYTES)
            got = f"one longer than {MAX_LINE_BYTES} bytes"
            yield number, Broken(_JSON_LINE, got, f"line {number}")
            continue
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line := line.strip():
            yield number, line


def _no_key_twice(items: list[tuple[str, Any]]) -> dict[str, Any]:
    record: dict[str, Any] = {}
    for key, value in items:
        if key in record:
            raise _SameKey(f"key {key[:60]!r}")
        record[key] = value
    return record


def _record(items: list[tuple[str, Any]]) -> dict[str, Any] | Broken:
    """An object of a document; one with a key twice costs its row alone."""
    try:
        return _no_key_twice(items)
    except _SameKey as error:
        return Broken("a JSON object", "one with a key twice", str(error))


def _parse_line(number: int, line: bytes | Broken) -> Any:
    if isinstance(line, Broken):
        return line
    try:
        return json.loads(line.decode("utf-8"), object_pairs_hook=_no_key_twice)
    except UnicodeDecodeError as error:
        return Broken(_JSON_LINE, "one that is not UTF-8", f"line {number}, byte {error.start}")
    except RecursionError:
        return Broken(_JSON_LINE, "one nested too deep", f"line {number}")
    except _SameKey as error:
        return Broken(_JSON_LINE, "one with a key twice", f"line {number}: {error}")
    except ValueError as error:
        return Broken(_JSON_LINE, "one that is not JSON", f"line {number}: {str(error)[:120]}")
