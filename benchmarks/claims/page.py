"""The tables of docs/claims.md between their marks, and its picture, from the rows."""

from __future__ import annotations

import statistics
from pathlib import Path

from benchmarks.claims import table
from benchmarks.claims.cells import GUARDS_AT
from benchmarks.claims.runs import read, with_twins
from benchmarks.claims.table import DEFAULT, Rows, Setting

_COLUMNS = 3  # of the picture
BEGIN, END = "<!-- claims: begin -->", "<!-- claims: end -->"


def write(path: Path, page: Path) -> None:
    """Put the tables of the rows at `path` into `page`, and the picture beside it."""
    rows = with_twins(read(path))
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    text = f"{before}{BEGIN}\n\n{tables(rows)}\n\n{END}{after}"
    page.write_text(text, encoding="utf-8")
    _draw(rows, page.with_name("claims.png"))


def tables(rows: Rows) -> str:
    """Everything that the page shows, as Markdown."""
    worlds = dict.fromkeys(row["world"] for row in rows)
    # A run that stands for the one without balance too differs from that in nothing else.
    runs = {tuple(value for key, value in row.items() if key != "balance") for row in rows}
    devices = "; ".join(dict.fromkeys(row["device"] for row in rows))
    last = max(row["date"] for row in rows)
    parts = [f"{len(runs)} runs, torch {rows[0]['torch']}, to {last}. {devices}."]
    for loss in ("rmipo", "simper"):
        parts += [
            f"Regret of the untuned `{loss}`:",
            table.regret_table(rows, Setting(loss, "auto")),
        ]
    for world in worlds:
        for task in dict.fromkeys(row["task"] for row in rows if row["world"] == world):
            parts += [f"### {world}: {task}", "Every default on, by loss and rate:"]
            parts.append(table.rate_table(rows, world, task))
            parts += ["Anchor and likelihood off, the better of balance on and off:"]
            parts.append(table.bare_table(rows, world, task))
            rate = GUARDS_AT.get(world, "auto")
            where = "the rate found" if rate == "auto" else rate
            parts += [f"What each of the three does to `rmipo`, at {where}:"]
            parts.append(table.end_rule_table(rows, world, task, rate))
        parts += [f"### {world}: other shapes", "Reward of the default, and the rate found:"]
        parts += [table.shape_table(rows, world)]
        started = table.start_table(rows, world)
        parts += [started] if started.count("\n") > 1 else []
    return "\n\n".join(parts)


def _draw(rows: Rows, path: Path) -> None:
    """Reward over the rate, one field a task: loss alone, defaults, and what is found."""
    from matplotlib.figure import Figure

    places = list(dict.fromkeys((row["world"], row["task"]) for row in rows))
    lines = -(-len(places) // _COLUMNS)
    figure = Figure(figsize=(3.6 * min(len(places), _COLUMNS), 3 * lines), layout="constrained")
    fields = figure.subplots(lines, min(len(places), _COLUMNS), squeeze=False).flatten()
    for unused in fields[len(places) :]:
        unused.set_axis_off()
    bare = {"balance": "off", "anchor": "0.0", "sft": "0.0"}
    for axes, (world, task) in zip(fields, places, strict=False):
        cells = table.grid(rows, world, task)
        for loss, colour in (("rmipo", "#2c6fa6"), ("simper", "#4daf7c")):
            for changed, style, name in ((bare, ":", "alone"), ({}, "-", "defaults")):
                points = sorted(
                    (float(s.rate), statistics.mean(table.rewards(runs)))
                    for s, runs in cells.items()
                    if not s.rate.startswith("auto")
                    and s == Setting(loss, s.rate)._replace(**changed)
                )
                if points:
                    axes.semilogx(*zip(*points, strict=True), style, color=colour,
                                  label=f"{loss}, {name}")  # fmt: skip
            if runs := cells.get(DEFAULT._replace(loss=loss)):
                found = [float(run["found rate"]) for run in runs.values()]
                axes.plot(statistics.geometric_mean(found),
                          statistics.mean(table.rewards(runs)), "o", color=colour)  # fmt: skip
        axes.set(title=f"{world}: {task}", xlabel="learning rate")
    fields[0].set_ylabel("true reward")
    fields[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)
