"""A run in a notebook: one panel that updates in place, in Jupyter, Colab, VS Code and nbconvert.

It is plain HTML in a display that IPython can replace: no widgets, no script, nothing to load. A
table, so that it still reads where a viewer takes the styles away; colours that hold on a light and
a dark page; small curves as images.
"""

import base64
import html
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from rmipo_lite.output import held_out
from rmipo_lite.output.console import say
from rmipo_lite.watch.run_progress import RunProgress

REDRAW_SECONDS = 0.5  # at most this often; the end is always drawn
_CURVE_POINTS = 60
_WIDTH, _HEIGHT = 96, 26  # of a curve, pixels
_LINE, _DOT = "#3f8fd2", "#e08a1e"
_GIB = 2**30
Points = Sequence[tuple[float, float]]


class _Cell(NamedTuple):
    """One column of the panel: its name, what is in it, and the metric its curve shows."""

    name: str
    value: str
    metric: str = ""


def panel_html(run: RunProgress) -> str:
    """The panel of a run: progress, the newest numbers, their curves, the held-out pairs."""
    cells = _cells(run)
    style = "border:none;text-align:left;padding:1px 12px 1px 0;white-space:nowrap"
    rows = [
        "".join(f'<th style="{style};font-weight:600;opacity:.7">{c.name}</th>' for c in cells),
        "".join(f'<td style="{style};font-size:115%">{html.escape(c.value)}</td>' for c in cells),
        "".join(f'<td style="{style}">{_curves(run, c.metric)}</td>' for c in cells),
    ]
    table = "".join(f'<tr style="background:none">{row}</tr>' for row in rows)
    return (
        '<div style="border:1px solid rgba(128,128,128,.4);border-radius:6px;padding:8px 12px;'
        'max-width:70rem;overflow-x:auto;font-variant-numeric:tabular-nums">'
        f"<div><b>rmipo_lite</b> &nbsp;{html.escape(run.headline)}</div>{_bar(run)}"
        f'<table style="border:none;margin:4px 0 0 0">{table}</table>{_held_out(run)}</div>'
    )


def _bar(run: RunProgress) -> str:
    if not run.max_steps:
        return ""
    return (
        f'<progress value="{run.step}" max="{run.max_steps}" '
        'style="width:100%;height:10px"></progress>'
    )


def _cells(run: RunProgress) -> list[_Cell]:
    newest: dict[str, Any] = run.logs[-1] if run.logs else {}

    def number(name: str, form: str, spread: str = "") -> str:
        if name not in newest:
            return "–"
        text = form.format(newest[name])
        return f"{text} ± {newest[spread]:.2f}" if spread in newest else text

    cells = [
        _Cell("loss", number("loss", "{:.4f}"), "loss"),
        _Cell("reward accuracy", number("rewards/accuracies", "{:.0%}"), "rewards/accuracies"),
        _Cell("reward margin", number("rewards/margins", "{:+.3f}"), "rewards/margins"),
    ]
    if not newest or "rmipo/gamma" in newest:  # the other losses have neither
        gamma = number("rmipo/gamma", "{:.2f}", "rmipo/gamma_std")
        gap = number("rmipo/pmi_gap", "{:+.2f}", "rmipo/pmi_gap_std")
        cells += [_Cell("gamma", gamma, "rmipo/gamma"), _Cell("PMI gap", gap, "rmipo/pmi_gap")]
    speed = run.tokens_per_second
    cells.append(_Cell("tokens/s", "–" if speed is None else f"{speed:,.0f}"))
    cells.append(_Cell("memory", _memory(run)))
    dropped = f"{run.dropped} in training, {run.data_dropped} before"
    cells.append(_Cell("pairs dropped", dropped if run.dropped + run.data_dropped else "0"))
    return cells


def _memory(run: RunProgress) -> str:
    if run.memory is None:
        return "–"
    used, there = run.memory
    return f"{used / _GIB:.1f} of {there / _GIB:.0f} GiB"


def _held_out(run: RunProgress) -> str:
    """The first and the newest evaluation in one line."""
    parts = []
    for name, label, form in (
        ("rewards/accuracies", "reward accuracy", "{:.1%}"),
        ("rewards/margins", "reward margin", "{:+.3f}"),
        ("loss", "loss", "{:.4f}"),
    ):
        logged = [key for entry in run.held_out for key in entry]
        for key, of_set in held_out.names_of(name, logged):
            values = [entry[key] for entry in run.held_out if key in entry]
            ends = values[:1] if len(values) == 1 else [values[0], values[-1]]
            arrow = " → ".join(form.format(value) for value in ends)
            parts.append(f"{html.escape(held_out.label(label, of_set))} {arrow}")
    if not parts:
        return ""
    return f'<div style="margin-top:4px"><b>held-out pairs</b> {", ".join(parts)}</div>'


def _curves(run: RunProgress, metric: str) -> str:
    if not metric:
        return ""
    line, dots = run.series(metric), run.series(metric, held_out=True)
    return _image(line, dots) if len(line) > 1 else ""


def _thinned(points: Points) -> Points:
    """At most `_CURVE_POINTS` of the points, first and last among them."""
    if len(points) <= _CURVE_POINTS:
        return points
    places = [round(i * (len(points) - 1) / (_CURVE_POINTS - 1)) for i in range(_CURVE_POINTS)]
    return [points[place] for place in places]


def _image(line: Points, dots: Points) -> str:
    """A training curve with the evaluations as dots, scaled to fill its image."""
    steps, values = zip(*line, *dots, strict=True)
    low, high = min(values), max(values)
    first, last = min(steps), max(steps)

    def place(point: tuple[float, float]) -> str:
        x = 3 + (_WIDTH - 6) * (point[0] - first) / max(last - first, 1)
        y = 3 + (_HEIGHT - 6) * (high - point[1]) / ((high - low) or 1)
        return f"{x:.1f},{y:.1f}"

    path = " ".join(place(point) for point in _thinned(line))
    circles = ""
    for dot in _thinned(dots):
        x, y = place(dot).split(",")
        circles += f'<circle cx="{x}" cy="{y}" r="2.5" fill="{_DOT}"/>'
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}">'
        f'<polyline points="{path}" fill="none" stroke="{_LINE}" stroke-width="1.5"/>{circles}'
        "</svg>"
    )
    data = base64.b64encode(svg.encode()).decode()
    return f'<img alt="" src="data:image/svg+xml;base64,{data}" style="margin:0">'


class NotebookPanel:
    """The panel in the cell that runs; it stays there, and the evaluation at the end updates it."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._drawn = 0.0
        self._is_broken = False

    def start(self, run: RunProgress) -> None:
        """Draw it anew, below what was said since the evaluation before training."""
        if self._handle is not None:
            self._put({"text/html": "", "text/plain": ""})
            self._handle = None
        self._draw(run)

    def update(self, run: RunProgress) -> None:
        if time.monotonic() - self._drawn >= REDRAW_SECONDS:
            self._draw(run)

    def begin_phase(self, run: RunProgress) -> None:
        """Shown at once."""
        self._draw(run)

    def tell(self, run: RunProgress, text: str) -> None:
        """An evaluation stands in the panel itself."""
        self._draw(run)

    def close(self, run: RunProgress) -> None:
        if self._handle is not None:
            self._draw(run)

    def end(self, run: RunProgress) -> None:
        """The last state was drawn by `close`."""

    def _draw(self, run: RunProgress) -> None:
        self._drawn = time.monotonic()
        self._put({"text/html": panel_html(run), "text/plain": f"{run.headline}  {run.numbers}"})

    def _put(self, bundle: dict[str, str]) -> None:
        if self._is_broken:
            return
        try:
            if self._handle is None:
                from IPython.display import display

                self._handle = display(bundle, raw=True, display_id=True)
            else:
                self._handle.update(bundle, raw=True)
        except Exception as error:
            # Whatever became of the page or its connection, a run of hours doesn't end with it.
            self._is_broken = True
            say(f"The panel is no longer drawn ({type(error).__name__}: {error}); training goes on")
