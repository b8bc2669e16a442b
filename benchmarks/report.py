"""The table of `docs/performance.md` and the plot, from the rows here and from nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import roofline
from benchmarks.records import Record, read

MARK = "benchmarks"
PLOT = "benchmarks.png"
PAGE = "docs/performance.md"  # where the table stands


class _Line(NamedTuple):
    """One line of the table: a metric of ours, and its shape in either column."""

    label: str
    op: str
    metric: str
    shapes: tuple[str, str]  # of the fp32 and the bf16 column


_STEP = ("V=32000 2 pairs", "V=131072 2 pairs")
_KEPT = ("V=32000 2 pairs, memory kept", "V=131072 2 pairs, memory kept")
_HEAD = ("V=32000 N=1024", "V=131072 N=1024")
_MEMORY = ("V=32000", "V=131072")
_LINES = (
    _Line("step time / authors' step", "step", "time over authors'", _STEP),
    _Line("the same where the allocator keeps memory", "step", "time over authors'", _KEPT),
    _Line("step time / authors' step on trl's head", "step", "time over trl chunked head", _STEP),
    _Line("step time / trl's SimPO (no prior)", "step", "time over trl SimPO", _STEP),
    _Line("step time / bare products and attention", "step", "time over floor", _STEP),
    _Line("prior's share of the step", "step", "prior's share", _STEP),
    _Line("peak memory / authors' step", "memory", "peak over authors'", _MEMORY),
    _Line("head time / its two bare products", "head", "time over floor", _HEAD),
    _Line("head time / plain autograd", "head", "time over plain autograd", _HEAD),
    _Line("head time / trl's chunked head", "head", "time over trl chunked head", _HEAD),
    _Line("head time / liger's chunked SimPO", "head", "time over liger chunked SimPO", _HEAD),
)
_DTYPES = ("fp32", "bf16")


def read_all(folder: Path) -> list[Record]:
    """The rows of every CSV in a folder that the device of the newest step rows measured.

    Ratios of one device belong together: a table never mixes them.
    """
    rows = [row for path in sorted(folder.glob("*.csv")) for row in read(path)]
    newest = _newest([row for row in rows if row.op == "step"])
    return [row for row in rows if newest is None or row.device == newest.device]


def table(rows: Sequence[Record]) -> str:
    """The table in Markdown; a dash where nothing was measured."""
    out = [
        "| ours, median (middle half) | fp32, 32k words | bf16, 128k words | rows |",
        "|---|---|---|---|",
    ]
    for line in _LINES:
        cells = [
            _cell(_find(rows, line.op, shape, dtype, line.metric))
            for shape, dtype in zip(line.shapes, _DTYPES, strict=True)
        ]
        out.append(f"| {line.label} | {' | '.join(cells)} | {line.op}.csv |")
    speed = _newest([r for r in rows if r.op == "data" and r.metric == "rows per second over trl"])
    out.append(f"| rows prepared per second / trl's preparation | {_cell(speed)} | | data.csv |")
    share = _newest([r for r in rows if r.metric == "outside model and operators"])
    out.append(f"| share of a step outside model and operators | {_cell(share)} | | step.csv |")
    return "\n".join(out)


def _find(rows: Sequence[Record], op: str, shape: str, dtype: str, metric: str) -> Record | None:
    key = (op, "ours", shape, dtype, metric)
    return _newest([r for r in rows if (r.op, r.impl, r.shape, r.dtype, r.metric) == key])


def _newest(rows: Sequence[Record]) -> Record | None:
    return max(rows, key=lambda row: row.date, default=None)


def _cell(row: Record | None) -> str:
    if row is None or isinstance(row.value, str):
        return "–"
    digits = 2 if row.value >= 0.1 else 3
    if row.low == row.high:
        return f"{row.value:.{digits}f}"
    return f"{row.value:.{digits}f} ({row.low:.{digits}f}–{row.high:.{digits}f})"


def write(folder: Path, page: Path) -> str:
    """Draw a folder's rows beside them and put their table into the page; returns the table."""
    rows = read_all(folder)
    draw(folder / PLOT, rows)
    text = table(rows)
    put_between(page, MARK, text)
    counted = folder / "roofline.csv"
    if counted.exists():
        put_between(page, "counted", roofline.table(read(counted)))
    return text


def put_between(page: Path, name: str, text: str) -> None:
    """Put a table between a page's markers `<!-- name: begin -->` and `<!-- name: end -->`.

    Raises:
        ValueError: the page hasn't got them.
    """
    begin, end = (f"<!-- {name}: {word} -->" for word in ("begin", "end"))
    whole = page.read_text(encoding="utf-8")
    if begin not in whole or end not in whole:
        raise ValueError(f"{page}: wanted the markers {begin} and {end}")
    head, rest = whole.split(begin)
    page.write_text(f"{head}{begin}\n{text}\n{end}{rest.split(end)[1]}", encoding="utf-8")


def draw(path: Path, rows: Sequence[Record]) -> None:
    """Step time by contender, and how time grows with vocabulary, tokens and pairs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _bars(left, rows)
    _growth(right, rows)
    FigureCanvasAgg(figure).print_png(str(path))


def _bars(axes, rows: Sequence[Record]) -> None:  # type: ignore[no-untyped-def]
    impls = ("authors", "trl SimPO", "trl chunked head", "ours", "floor")
    cases = list(zip(_STEP, _DTYPES, strict=True))
    width = 0.8 / len(impls)
    for i, impl in enumerate(impls):
        heights = []
        for shape, dtype in cases:
            times = [
                r.value
                for r in rows
                if (r.op, r.impl, r.shape, r.dtype, r.metric)
                == ("step", impl, shape, dtype, "time")
            ]
            heights.append(times[-1] if times and isinstance(times[-1], float) else 0.0)
        positions = [c + (i - (len(impls) - 1) / 2) * width for c in range(len(cases))]
        bars = axes.bar(positions, heights, width, label=impl)
        axes.bar_label(bars, fmt="%.2f", fontsize=7)
    axes.set_xticks(range(len(cases)), ["fp32, 32k words", "bf16, 128k words"])
    axes.set_ylabel("seconds (median)")
    axes.set_title("One micro-step of 2 real-length pairs, forward and backward")
    axes.legend(frameon=False, fontsize=8)


def _growth(axes, rows: Sequence[Record]) -> None:  # type: ignore[no-untyped-def]
    lines = (
        ("head, fp32: vocabulary at 1024 tokens", "head", "V", "N=1024"),
        ("head, fp32: tokens at 32k words", "head", "N", "V=32000"),
        ("step, fp32: pairs at 32k words", "step", "pairs", "V=32000"),
    )
    for label, op, axis, fixed in lines:
        points = sorted(
            (_size(r.shape, axis), r.value)
            for r in rows
            if r.op == op and r.metric == "growth: time" and r.dtype == "fp32"
            and fixed in r.shape.split() and isinstance(r.value, float)
        )  # fmt: skip
        if points:
            first = points[0]
            axes.plot(
                [x / first[0] for x, _ in points], [y / first[1] for _, y in points], "o-",
                label=label,
            )  # fmt: skip
    limit = axes.get_xlim()[1]
    axes.plot([1, limit], [1, limit], "k:", linewidth=1, label="linear")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlabel("size, as a multiple of the smallest")
    axes.set_ylabel("time, as a multiple of the smallest's")
    axes.set_title("How our time grows")
    axes.legend(frameon=False, fontsize=8)


def _size(shape: str, axis: str) -> int:
    words = shape.split()
    if axis == "pairs":
        return int(words[words.index("pairs") - 1])
    return next(int(w.removeprefix(f"{axis}=")) for w in words if w.startswith(f"{axis}="))
