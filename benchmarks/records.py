"""Benchmark rows: what was measured, where and when. One CSV per benchmark in `benchmarks/`."""

from __future__ import annotations

import csv
import datetime
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from rmipo_lite.version import __version__


def device_name() -> str:
    """The card, or the processor with its threads and the widest arithmetic torch uses on it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{_processor()}, {torch.get_num_threads()} threads, {_arithmetic()}"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return " ".join(line.split(":", 1)[1].split())
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _arithmetic() -> str:
    words = [torch.backends.cpu.get_cpu_capability()]
    if torch.cpu._is_amx_tile_supported():
        words.append("AMX")
    elif torch.cpu._is_avx512_bf16_supported():
        words.append("AVX512_BF16")
    return "+".join(words)


@dataclass(frozen=True)
class Record:
    """One number. `low` and `high` are its quartiles over the rounds; equal where it has none."""

    op: str  # which benchmark: head, step, memory, data
    impl: str  # who was measured: ours, authors, floor, trl ...
    shape: str  # of the input, for example V=32000 N=1024
    dtype: str
    metric: str  # what: time, ratio to authors, peak memory ...
    unit: str
    value: float | str  # "absent: why" where it can't run here
    low: float | str = ""
    high: float | str = ""
    device: str = field(default_factory=device_name)
    torch: str = field(default_factory=lambda: torch.__version__)
    version: str = __version__
    date: str = field(default_factory=lambda: datetime.date.today().isoformat())


_NUMBERS = ("value", "low", "high")
# Rows that agree in these are the same measurement; a newer one takes the older one's place.
_KEY = ("op", "impl", "shape", "dtype", "metric", "device")


def write(path: Path, records: Iterable[Record]) -> None:
    """Add rows to a CSV; a row of the same measurement on the same device is replaced."""
    kept = {_key(record): record for record in (read(path) if path.exists() else [])}
    kept |= {_key(record): record for record in records}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Record)], lineterminator="\n")
        writer.writeheader()
        for record in kept.values():
            row = asdict(record)
            row |= {n: f"{row[n]:.5g}" for n in _NUMBERS if isinstance(row[n], float)}
            writer.writerow(row)


def read(path: Path) -> list[Record]:
    """The rows of a CSV."""
    with path.open(encoding="utf-8", newline="") as file:
        rows: list[dict[str, Any]] = [
            {k: _parse(k, v) for k, v in row.items()} for row in csv.DictReader(file)
        ]
    return [Record(**row) for row in rows]


def _parse(name: str, text: str) -> float | str:
    if name not in _NUMBERS:
        return text
    try:
        return float(text)
    except ValueError:
        return text


def _key(record: Record) -> Sequence[str]:
    return tuple(getattr(record, name) for name in _KEY)
