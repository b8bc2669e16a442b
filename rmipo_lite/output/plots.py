"""One figure of a run: loss, accuracy and margin, gamma and PMI gap, lengths, its own answers.

Matplotlib is imported when a figure is drawn, and the figure is made without pyplot, so that
nothing is left in a notebook's global state and no window opens.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from rmipo_lite.output import held_out

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

History = Sequence[dict[str, Any]]

_PAIR_LOSS = "rmipo/pair_loss"  # beside eval_loss: "loss" is all that a step minimises
# title, y label, ((metric, label), ...): a panel appears when the history has one of its metrics
_Panels = Sequence[tuple[str, str, tuple[tuple[str, str], ...]]]
_PANELS: _Panels = (
    ("Loss", "nats", (("loss", "training"), ("eval_loss", "held out"))),
    (
        "Reward accuracy",
        "share of pairs",
        (("rewards/accuracies", "training"), ("eval_rewards/accuracies", "held out")),
    ),
    (
        "Reward margin",
        "reward units",
        (("rewards/margins", "training"), ("eval_rewards/margins", "held out")),
    ),
    (
        "Gamma",
        "reward units; share",
        (("rmipo/gamma", "mean"), ("rmipo/gamma_at_max", "share at max")),
    ),
    (
        "PMI gap",
        "nats per token",
        (
            ("rmipo/pmi_gap", "gap"),
            ("rmipo/pmi_chosen", "chosen"),
            ("rmipo/pmi_rejected", "rejected"),
        ),
    ),
    ("Response length", "tokens", (("lengths/chosen", "chosen"), ("lengths/rejected", "rejected"))),
    ("Length of held-out answers", "tokens", (("eval_completions/mean_length", "mean"),)),
    (
        "Faults of held-out answers",
        "share",
        (
            ("eval_completions/clipped_ratio", "without an end"),
            ("eval_completions/repetition", "phrases repeated"),
        ),
    ),
)


def series(history: History, metric: str) -> tuple[list[float], list[float]]:
    """(steps, values) of one metric, in the order of the log."""
    points = [(e["step"], e[metric]) for e in history if metric in e and "step" in e]
    return [float(step) for step, _ in points], [float(value) for _, value in points]


def _draw_gamma_band(axes: Axes, history: History) -> None:
    steps, spread = series(history, "rmipo/gamma_std")
    by_step = dict(zip(*series(history, "rmipo/gamma"), strict=True))
    both = [(s, by_step[s], d) for s, d in zip(steps, spread, strict=True) if s in by_step]
    if both:
        at, mean, std = (list(column) for column in zip(*both, strict=True))
        low = [m - d for m, d in zip(mean, std, strict=True)]
        high = [m + d for m, d in zip(mean, std, strict=True)]
        axes.fill_between(at, low, high, alpha=0.2, linewidth=0)


class _Panel(NamedTuple):
    """What one pair of axes shows."""

    title: str
    unit: str
    metrics: list[tuple[str, str]]


def _panels(history: History, more: _Panels = ()) -> list[_Panel]:
    """The panels of which something was logged."""
    logged = dict.fromkeys(name for entry in history for name in entry)
    every = [
        _Panel(title, unit, [line for m, label in metrics for line in _lines(m, label, logged)])
        for title, unit, metrics in (*_PANELS, *more)
    ]
    return [panel for panel in every if panel.metrics]


def _lines(metric: str, label: str, logged: Iterable[str]) -> list[tuple[str, str]]:
    """The metric and its label, where it was logged; of several held-out sets one of each."""
    if metric == "loss" and _PAIR_LOSS in logged:
        metric = _PAIR_LOSS
    if not metric.startswith(held_out.PREFIX):
        return [(metric, label)] if metric in logged else []
    found = held_out.names_of(metric.removeprefix(held_out.PREFIX), logged)
    return [(name, held_out.label(label, of_set)) for name, of_set in found]


def _draw(axes: Axes, panel: _Panel, history: History) -> None:
    if panel.title == "Gamma":
        _draw_gamma_band(axes, history)
    for metric, label in panel.metrics:
        steps, values = series(history, metric)
        marker = "o" if len(steps) < 3 or metric.startswith("eval_") else ""
        axes.plot(steps, values, label=label, marker=marker, markersize=4)
    axes.set(title=panel.title, xlabel="optimizer step", ylabel=panel.unit)
    if panel.title == "Reward accuracy":  # else a change of one pair looks like a collapse
        axes.set_ylim(-0.03, 1.03)
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize="small")


def new_figure(width: float, height: float) -> Figure:
    """A figure of this size in inches, made without pyplot, that a notebook shows all the same."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    class ShownFigure(Figure):
        def _repr_png_(self) -> bytes:
            buffer = io.BytesIO()
            FigureCanvasAgg(self).print_png(buffer)
            return buffer.getvalue()

    return ShownFigure(figsize=(width, height), layout="constrained")


def figure(history: History, more: _Panels = ()) -> Figure:
    """The run's curves in one matplotlib figure; an empty history gives a figure that says so.

    `more` panels, each (title, unit, ((metric, label), ...)), stand behind the usual ones.
    """
    panels = _panels(history, more)
    if not panels:
        empty = new_figure(5, 1.5)
        empty.text(0.5, 0.5, "no metric was logged", ha="center", va="center")
        return empty
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    drawn = new_figure(4 * columns, 2.8 * rows)
    for place, panel in enumerate(panels, start=1):
        _draw(drawn.add_subplot(rows, columns, place), panel, history)
    return drawn


# A colour that no curve has, which the page's own text colour takes the place of.
_INK = "#010203"


def svgs(history: History) -> list[str]:
    """The panels as `<svg>` elements for an HTML page: no file, no script, no date.

    They take the width they are given, and their text the colour of the page, light or dark.
    """
    return [
        svg_panel(lambda axes, panel=panel: _draw(axes, panel, history))  # type: ignore[misc]
        for panel in _panels(history)
    ]


def svg_panel(draw: Callable[[Axes], None]) -> str:
    """One small panel, drawn by `draw`, as an `<svg>` element in the page's own colours."""
    import matplotlib

    ink = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    colors: dict[Any, Any] = dict.fromkeys(ink, _INK)
    colors |= {"legend.framealpha": 0.0, "svg.fonttype": "none"}
    with matplotlib.rc_context(colors):
        small = new_figure(4, 2.8)
        small.patch.set_alpha(0.0)
        axes = small.add_subplot()
        axes.patch.set_alpha(0.0)
        draw(axes)
        return svg(small)


def beside(panels: Sequence[str]) -> str:
    """Panels as many beside each other as the page has room for."""
    box = '<div style="flex:1 1 17rem;max-width:26rem">'
    shown = "".join(f"{box}{panel}</div>" for panel in panels)
    return f'<div style="display:flex;flex-wrap:wrap;gap:.5rem">{shown}</div>'


def svg(drawn: Figure) -> str:
    """A figure as one `<svg>` element that takes the width it is given."""
    buffer = io.StringIO()
    drawn.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue().replace(_INK, "currentColor")
    element = text[text.index("<svg") :]
    head, rest = element.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    return f'{head} style="width:100%;height:auto">{rest}'
