"""One figure of a run: loss, accuracy and margin, gamma and PMI gap, response lengths.

Matplotlib is imported when a figure is drawn, and the figure is made without pyplot, so that
nothing is left in a notebook's global state and no window opens.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

History = Sequence[dict[str, Any]]

# title, y label, ((metric, label), ...): a panel appears when the history has one of its metrics
_PANELS: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
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
    (
        "Response length",
        "tokens",
        (
            ("lengths/chosen", "chosen"),
            ("lengths/rejected", "rejected"),
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


def figure(history: History) -> Figure:
    """The run's curves in one matplotlib figure; an empty history gives a figure that says so."""
    from matplotlib.figure import Figure

    shown = [
        (title, unit, [(m, label) for m, label in metrics if series(history, m)[0]])
        for title, unit, metrics in _PANELS
    ]
    shown = [panel for panel in shown if panel[2]]
    if not shown:
        empty = Figure(figsize=(5, 1.5), layout="constrained")
        empty.text(0.5, 0.5, "no metric was logged", ha="center", va="center")
        return empty
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    drawn = Figure(figsize=(4 * columns, 2.8 * rows), layout="constrained")
    for place, (title, unit, metrics) in enumerate(shown, start=1):
        axes = drawn.add_subplot(rows, columns, place)
        if title == "Gamma":
            _draw_gamma_band(axes, history)
        for metric, label in metrics:
            steps, values = series(history, metric)
            marker = "o" if len(steps) < 3 or metric.startswith("eval_") else ""
            axes.plot(steps, values, label=label, marker=marker, markersize=4)
        axes.set(title=title, xlabel="optimizer step", ylabel=unit)
        axes.grid(visible=True, alpha=0.3)
        axes.legend(fontsize="small")
    return drawn


def svg(history: History) -> str:
    """The figure as an `<svg>` element for an HTML page: no file, no script, no date."""
    buffer = io.StringIO()
    figure(history).savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
