"""How much an option decides: a measure over the values that runs of a comparison had of it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rmipo_lite.checkpoints.weights import CONFIG_FILE
from rmipo_lite.comparing.worth import Estimated
from rmipo_lite.methods.table import is_option_of
from rmipo_lite.output import plots
from rmipo_lite.output.figures import Captioned, Figures
from rmipo_lite.system.files import read_object

NAME = "sensitivity"
_WIDE = 10.0  # times from the least to the most, from which an axis is logarithmic

Options = dict[str, dict[str, Any]]  # method -> the options in which it differs
Line = dict[float, Estimated]  # value -> measure


def with_defaults(runs: Mapping[str, tuple[Mapping[str, Any], Path]]) -> Options:
    """Every method's options, with what it had of those that others were given a number of.

    Args:
        runs: method -> (the options in which it differs, the folder of one of its runs, which says
            what the others were).
    """
    given = {method: dict(own) for method, (own, _) in runs.items()}
    names = _numeric(given)
    for method, (own, folder) in runs.items():
        had = read_object(folder / CONFIG_FILE)
        loss = str(own.get("loss_type", had.get("loss_type", "rmipo")))
        given[method] |= {
            name: had[name]
            for name in names
            if name not in own and _is_number(had.get(name)) and is_option_of(name, loss)
        }
    return given


def sensitivity(options: Options, means: Mapping[str, Estimated], words: str, unit: str) -> Figures:
    """A panel for every option that some methods differ in by its value alone (figure 2).

    Args:
        options: of every method that has runs.
        means: the measure of each, with its standard error.
        words, unit: of the measure.
    """
    panels = {name: lines for name in _numeric(options) if (lines := _lines(name, options, means))}
    if not panels:
        return Figures({}, {NAME: "no two methods differ in the value of one option alone"})
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    drawn = plots.new_figure(4.5 * columns, 3.4 * rows)
    for place, (name, lines) in enumerate(panels.items(), start=1):
        _draw(drawn.add_subplot(rows, columns, place), name, lines, f"{words} {unit}".strip())
    caption = (
        f"{words[:1].upper()}{words[1:]} over the values of {', '.join(panels)}; bars are 95 % "
        "intervals of pairs or prompts and seeds together. After the paper's figure 2; which "
        "options, and over which range, is what this comparison trained."
    )
    return Figures({NAME: Captioned(drawn, caption)}, {})


def _numeric(options: Options) -> list[str]:
    return list(
        dict.fromkeys(
            name for own in options.values() for name, value in own.items() if _is_number(value)
        )
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _lines(name: str, options: Options, means: Mapping[str, Estimated]) -> dict[str, Line]:
    """What is alike but for the option -> its value -> the measure; of two values or more."""
    found: dict[str, Line] = defaultdict(dict)
    for method, own in options.items():
        value = own.get(name)
        if value is not None and _is_number(value) and not math.isnan(means[method].mean):
            rest = {key: kept for key, kept in own.items() if key != name}
            found[_named(rest)][float(value)] = means[method]
    return {words: line for words, line in found.items() if len(line) > 1}


def _named(options: Mapping[str, Any]) -> str:
    loss, *rest = (str(options.get("loss_type", "")), *options.items())
    return ", ".join([loss, *(f"{key}={kept}" for key, kept in rest if key != "loss_type")])


def _draw(axes: Any, name: str, lines: Mapping[str, Line], words: str) -> None:
    for label, line in lines.items():
        at: Sequence[float] = sorted(line)
        spread = [1.96 * line[v].error if math.isfinite(line[v].error) else 0.0 for v in at]
        axes.errorbar(
            at, [line[v].mean for v in at], yerr=spread, marker="o", capsize=3, label=label
        )
    every = sorted({value for line in lines.values() for value in line})
    if every[0] > 0 and every[-1] >= _WIDE * every[0]:
        axes.set_xscale("log")
        axes.minorticks_off()
    axes.set_xticks(every, [f"{value:g}" for value in every])
    axes.set(xlabel=name, ylabel=words)
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize="small")
