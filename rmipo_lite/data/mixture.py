"""Several datasets as one: a list of names or paths, each whole or with its share of the rows."""

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rmipo_lite.data.sources import read_records

_SEED = 0  # of which rows a share takes: the same ones in every run


class Part(NamedTuple):
    """One source and its records, which may be fewer than it has."""

    source: str
    records: list[Any]
    of: int  # how many it has


def is_mixture(dataset: Any) -> bool:
    """Whether these are several datasets: names or paths, or (dataset, share) pairs."""
    return (
        isinstance(dataset, (list, tuple))
        and len(dataset) > 0
        and all(isinstance(part, str | Path) or _has_share(part) for part in dataset)
    )


def read_parts(dataset: Any, split: str | None) -> list[Part]:
    """The one dataset, or every part of a mixture, in order.

    With shares as many rows as there are are taken so that the shares hold, none of them twice.

    Raises:
        ValueError: shares that aren't all positive numbers, or for some parts only; as
            `read_records`.
        FileNotFoundError: a path that does not exist.
    """
    if not is_mixture(dataset):
        source, records = read_records(dataset, split)
        return [Part(source, records, len(records))]
    shares = [float(part[1]) for part in dataset if _has_share(part)]
    if len(shares) not in (0, len(dataset)):
        raise ValueError("dataset: a mixture has a share for every part, or for none")
    if not all(0 < share < math.inf for share in shares):
        raise ValueError(f"dataset: shares must be numbers > 0, got {shares}")
    parts = []
    for part in dataset:
        source, records = read_records(part[0] if shares else part, split)
        if not records:
            raise ValueError(f"dataset: {source} has no rows, wanted at least one pair")
        parts.append(Part(source, records, len(records)))
    return _shared(parts, shares) if shares else parts


def _has_share(part: Any) -> bool:
    is_pair = isinstance(part, (list, tuple)) and len(part) == 2
    return is_pair and isinstance(part[1], (int, float)) and not isinstance(part[1], bool)


def _shared(parts: Sequence[Part], shares: Sequence[float]) -> list[Part]:
    """As many rows as every part has enough for, drawn without order and kept in it."""
    whole = min(part.of / share for part, share in zip(parts, shares, strict=True))
    found = []
    for part, share in zip(parts, shares, strict=True):
        count = min(part.of, max(1, round(share * whole)))
        places = sorted(random.Random(_SEED).sample(range(part.of), count))
        found.append(part._replace(records=[part.records[place] for place in places]))
    return found


def file_name(source: str) -> str:
    """A source without the folders that it lies in: reports go to others; a hub's name stays."""
    name, bracket, split = source.partition("[")
    try:
        is_here = Path(name).expanduser().exists()
    except (OSError, RuntimeError):  # no path at all
        return source
    return (Path(name).name or name) + bracket + split if is_here else source


def mixture_source(parts: Sequence[Part]) -> str:
    """What the report calls it."""
    if len(parts) == 1:
        return parts[0].source
    return " + ".join(f"{p.source} ({len(p.records)} of {p.of} rows)" for p in parts)


def rows_of_parts(parts: Sequence[Part]) -> list[str]:
    """Which row numbers are of which part; empty of one."""
    lines, first = [], 0
    for part in parts if len(parts) > 1 else ():
        lines.append(f"rows {first} to {first + len(part.records) - 1}: {part.source}")
        first += len(part.records)
    return lines
