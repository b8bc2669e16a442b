"""Any container of preference rows -> a list of records, faulty records included.

One function, `read_records`, knows every kind of input. Files are read here and not through
`datasets`, because files come from strangers: lines have a limit, gzip is recognised by its magic
and its expansion is limited, a broken line costs that line alone, and nothing is ever evaluated or
unpickled. A record that could not be read is a `Broken` in its place, so that row numbers stay.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

MAX_LINE_BYTES = 16 * 2**20  # one JSON line
MAX_FILE_BYTES = 4 * 2**30  # a .json or .parquet.gz, which is read whole
MAX_GZIP_RATIO = 200  # plain text reaches about 20
GZIP_FREE_BYTES = 256 * 2**20  # below this no ratio is asked for
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True, slots=True)
class Broken:
    """A record that could not be read: the reason, and where."""

    reason: str
    example: str = ""


Record = Mapping[str, Any] | Broken


def read_records(dataset: Any, split: str) -> tuple[str, list[Any]]:
    """(name of the source, its records in order); a record that is not a mapping is passed on.

    Raises:
        ValueError: not a dataset, an unreadable file, a missing split, columns of unequal length.
        FileNotFoundError: a path that does not exist.
    """
    if isinstance(dataset, str | Path):
        return _read_named(str(dataset), split)
    kind = type(dataset).__name__
    if hasattr(dataset, "to_dict") and hasattr(dataset, "columns"):  # pandas
        return f"pandas {kind}", dataset.to_dict("records")
    if kind in ("DatasetDict", "IterableDatasetDict"):
        return _read_split(dataset, split)
    if isinstance(dataset, Mapping):
        return "dict of lists", _transpose(dataset)
    if hasattr(dataset, "to_list") and hasattr(dataset, "column_names"):  # datasets.Dataset
        return kind, dataset.to_list()
    if isinstance(dataset, bytes) or not isinstance(dataset, Iterable):
        raise ValueError(
            "dataset: wanted a hub name, a path, a Dataset or DatasetDict, a list of dicts, a dict "
            f"of lists, a DataFrame or an iterable of dicts; got {kind}"
        )
    return kind, list(dataset)


def _read_named(name: str, split: str) -> tuple[str, list[Any]]:
    path = Path(name).expanduser()
    if path.is_dir():
        return name, _read_folder(path, split)
    if path.is_file():
        return name, _read_file(path)
    looks_local = path.suffix in (*SUFFIXES, ".gz") or name.startswith(("/", ".", "~"))
    if looks_local or name.count("/") > 1 or not name:
        raise FileNotFoundError(f"dataset: there is no file or folder {name!r} in {Path.cwd()}")
    return name, _read_hub(name, split)


def _read_hub(name: str, split: str) -> list[Any]:
    import datasets

    try:
        loaded = datasets.load_dataset(name)
    except Exception as error:  # the hub client raises many kinds; all mean "could not be had"
        raise ValueError(
            f"dataset: {name!r} is neither a file or folder here nor a dataset that could be had "
            f"from the hub ({type(error).__name__}: {str(error)[:300]})"
        ) from error
    return _read_split(loaded, split)[1]


def _read_split(dataset: Any, split: str) -> tuple[str, list[Any]]:
    if not hasattr(dataset, "keys"):
        return read_records(dataset, split)
    names = list(dataset.keys())
    if split not in names:
        if len(names) != 1:
            raise ValueError(
                f"dataset: no split {split!r} among {names}; pass one, e.g. dataset[{names[0]!r}]"
                if names
                else "dataset: the DatasetDict is empty"
            )
        split = names[0]
    source, records = read_records(dataset[split], split)
    return f"{source}[{split}]", records


def _read_folder(path: Path, split: str) -> list[Any]:
    if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        import datasets

        try:
            loaded = datasets.load_from_disk(str(path))
        except Exception as error:  # arrow and datasets raise many kinds
            raise ValueError(
                f"dataset: the folder {path} could not be read as a saved dataset "
                f"({type(error).__name__}: {str(error)[:300]})"
            ) from error
        return _read_split(loaded, split)[1]
    files = sorted(
        file for file in path.iterdir() if file.name.removesuffix(".gz").endswith(SUFFIXES)
    )
    files = [file for file in files if split in file.name] or files
    if not files:
        raise ValueError(
            f"dataset: the folder {path} holds no saved dataset and no file that ends in "
            f"{', '.join(SUFFIXES)} (also .gz)"
        )
    return [record for file in files for record in _read_file(file)]


def _transpose(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    lengths = {}
    for name, column in columns.items():
        if isinstance(column, str | bytes | Mapping) or not isinstance(column, Iterable):
            raise ValueError(
                "dataset: a dict must map column names to lists of equal length; column "
                f"{name!r} is {type(column).__name__}"
            )
        lengths[name] = len(list(column))
    if len(set(lengths.values())) > 1:
        raise ValueError(f"dataset: columns of unequal length: {lengths}")
    rows = zip(*columns.values(), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in rows]


class _LimitedReader(io.RawIOBase):
    """A decompressed stream that refuses to grow past MAX_GZIP_RATIO times its file."""

    def __init__(self, path: Path) -> None:
        self._stream = gzip.open(path)  # noqa: SIM115 - closed by close()
        self._path = path
        self._left = max(GZIP_FREE_BYTES, MAX_GZIP_RATIO * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._stream.readinto(buffer)
        self._left -= count
        if self._left < 0:
            raise ValueError(
                f"dataset: {self._path} expands to more than {MAX_GZIP_RATIO} times its size; "
                "unpack it by hand if that is right"
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
        raise ValueError(f"dataset: {path} is UTF-16; save it as UTF-8")
    return path.open("rb")


def _read_file(path: Path) -> list[Any]:
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    try:
        with _open(path) as file:
            if suffix == ".parquet":
                return _read_parquet(file)
            if suffix in (".csv", ".tsv"):
                return _read_csv(file, "\t" if suffix == ".tsv" else ",")
            if suffix in (".jsonl", ".ndjson", ".json"):
                return _read_json(file)
    except (OSError, EOFError) as error:  # a cut or damaged gzip, no permission
        raise ValueError(
            f"dataset: {path} can't be read ({type(error).__name__}: {error})"
        ) from error
    raise ValueError(
        f"dataset: {path} ends in {suffix!r}; wanted one of {', '.join(SUFFIXES)} (also .gz)"
    )


def _read_parquet(file: IO[bytes]) -> list[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        return list(pyarrow.parquet.read_table(io.BytesIO(_read_whole(file))).to_pylist())
    except pyarrow.ArrowException as error:
        raise ValueError(f"dataset: not a readable parquet file ({str(error)[:300]})") from error


def _read_whole(file: IO[bytes]) -> bytes:
    content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"dataset: more than {MAX_FILE_BYTES} bytes in one file; split it")
    return content


def _read_csv(file: IO[bytes], delimiter: str) -> list[Any]:
    # surrogateescape turns bad bytes into lone surrogates, which are refused row by row later.
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    limit = csv.field_size_limit(MAX_LINE_BYTES)
    try:
        return list(csv.DictReader(text, delimiter=delimiter))
    except csv.Error as error:
        raise ValueError(f"dataset: not a readable CSV file ({error})") from error
    finally:
        csv.field_size_limit(limit)
        text.detach()


def _read_json(file: IO[bytes]) -> list[Any]:
    """JSON lines, or one JSON document (a list of dicts, a dict of lists), told by its start."""
    lines = _lines(file)
    first = next(lines, None)
    if first is None:
        return []
    number, start = first
    if isinstance(start, bytes) and _starts_document(start):
        return _document(start + b"\n" + _read_whole(file))
    records = [] if start == b"" else [_parse_line(number, start)]
    records += [_parse_line(number, line) for number, line in lines]
    return records


def _starts_document(line: bytes) -> bool:
    """A list, or an object that is not complete in its line, is no JSON line."""
    if line.startswith(b"["):
        return True
    if not line.startswith(b"{"):
        return False
    if line == b"{":
        return True
    try:
        parsed = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return (
        bool(parsed)
        and all(isinstance(value, list) for value in parsed.values())
        and not (_is_messages(parsed.get("chosen")))
    )


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _document(content: bytes) -> list[Any]:
    try:
        document = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"dataset: the file is neither JSON lines nor one JSON document ({str(error)[:200]})"
        ) from error
    if isinstance(document, list):
        return document
    return _transpose(document)


def _lines(file: IO[bytes]) -> Iterator[tuple[int, bytes | Broken]]:
    """(1-based line number, line without its end) of every line that is not blank."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE_BYTES)
            yield number, Broken(f"a line longer than {MAX_LINE_BYTES} bytes", f"line {number}")
            continue
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line := line.strip():
            yield number, line


def _no_duplicates(items: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(items)
    if len(record) != len(items):
        raise ValueError("the same key twice in one object")
    return record


def _parse_line(number: int, line: bytes | Broken) -> Any:
    if isinstance(line, Broken):
        return line
    try:
        return json.loads(line.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except UnicodeDecodeError as error:
        return Broken("a line that is not UTF-8", f"line {number}, byte {error.start}")
    except RecursionError:
        return Broken("a line nested too deep", f"line {number}")
    except ValueError as error:
        return Broken("a line that is not JSON", f"line {number}: {str(error)[:120]}")
