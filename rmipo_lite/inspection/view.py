"""How an `Inspection` is shown: text, tables for a notebook, one HTML page, a figure.

All four show the same facts; every text that comes from data is escaped on its way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rmipo_lite.data.report import name_rows
from rmipo_lite.inspection.pair_scores import OPTIONS
from rmipo_lite.inspection.suspicious import RULES, SuspiciousPair
from rmipo_lite.methods.table import SumLoss
from rmipo_lite.output import plots
from rmipo_lite.output.console import printable
from rmipo_lite.output.page import html_page
from rmipo_lite.output.table import escaped, html_table, labelled, text_table, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from rmipo_lite.inspection.facts import InspectionFacts
    from rmipo_lite.inspection.text_checks import TextFinding

_WIDTH = 98  # characters of a line
_SHAPE = (18, _WIDTH, "  ")  # of labelled lines: label, line, indent
_TEXT_SHOWN = 600  # characters of a text in a table
_BINS = 40
_TAIL = 0.5  # per cent of the pairs at each end that the outermost bins hold

Rows = list[tuple[str, ...]]
Facts = list[tuple[str, str]]


def facts(inspection: InspectionFacts) -> Facts:
    """(label, value): what became of the rows, and what length tells."""
    kept = ("source", "rows", "labels", "dropped", "refused", "distinct prompts", "not used")
    shown = [fact for fact in inspection.data_report.facts() if fact[0] in kept]
    return shown + inspection.length_bias()[0]


def lengths(inspection: InspectionFacts) -> Rows:
    """Length of prompts and responses: name, 5th, 50th, 95th percentile, longest."""
    rows: Rows = []
    for side in ("prompt", "chosen", "rejected"):
        values = inspection.lengths_of(side)
        if not len(values):  # of unpaired rows that all have one label
            continue
        ranks = [*np.percentile(values, (5, 50, 95), method="nearest"), values.max()]
        rows.append((f"{side}, {inspection.unit}", *(str(int(rank)) for rank in ranks)))
    return rows


def numbers(inspection: InspectionFacts) -> Rows:
    """What the model thinks: name with unit, mean, 5th, 50th, 95th percentile."""
    rows: Rows = []
    for quantity in _quantities(inspection):
        values = quantity.values[np.isfinite(quantity.values)]
        if len(values):
            ranks = (values.mean(dtype=float), *np.percentile(values, (5, 50, 95)))
            label = f"{quantity.title}, {quantity.unit}"
            rows.append((label, *(f"{rank:.3f}" for rank in ranks)))
    return rows


def model_facts(inspection: InspectionFacts) -> Facts:
    """(label, value) about the pairs under the model."""
    scores, means = inspection.scores, inspection.metrics
    if scores is None:
        return []
    count = int(scores.scored.sum())
    again = f", {scores.taken_over} of them by an earlier call" if scores.taken_over else ""
    found = [("pairs scored", f"{count}{again}")]
    bad = np.flatnonzero(scores.scored & ~scores.finite)
    if len(bad):
        named = name_rows(inspection.rows[place].index for place in bad.tolist())
        found.append(("NOT FINITE", f"{len(bad)}, left out of every number (rows {named})"))
    if "rewards/accuracies" in means:
        share = means["rewards/accuracies"]
        right = (
            "reward's sign is the label's"
            if inspection.args.loss.unpaired
            else ("chosen likelier than rejected")
        )
        found.append(("accuracy", f"{share:.1%} before training ({right})"))
    if "rmipo/gamma_at_max" in means:
        share = means["rmipo/gamma_at_max"]
        found.append(("gamma at maximum", f"{share:.1%} of the pairs (PMI gap 0 or below)"))
        undefined = round(means["rmipo/pmi_undefined"] * int(scores.finite.sum()))
        if undefined:
            why = "a response of one token has no prior; their gap counts as 0"
            found.append(("PMI undefined", f"{undefined} pairs: {why}"))
    elif means:
        found.append(("PMI", f"not computed: loss_type {inspection.args.loss_type} has no prior"))
    return found


def finding_rows(findings: Sequence[TextFinding]) -> Rows:
    """(level, what was seen, where, what to do) as texts."""
    return [(f.level, f"{f.text}.", _where(f), f"{f.advice}.") for f in findings]


def _where(finding: TextFinding) -> str:
    tally = finding.tally
    if not tally.count:
        return ""
    example = f"; e.g. {tally.example}" if tally.example else ""
    return f"row{'s' * (tally.count > 1)} {name_rows(tally.numbers())}{example}"


def text(inspection: InspectionFacts, top: int) -> str:
    """Everything for a terminal of 100 columns."""
    lines = ["Inspection", *labelled(facts(inspection), *_SHAPE), ""]
    lines += _columns(("", "p5", "p50", "p95", "max"), lengths(inspection))
    if inspection.scores is not None:
        lines += [
            "",
            f"Under {inspection.model_name}",
            *labelled(model_facts(inspection), *_SHAPE),
            "",
        ]
        lines += _columns(("", "mean", "p5", "p50", "p95"), numbers(inspection))
    lines += ["", "Findings" if inspection.findings else "Findings: none"]
    for level, seen, where, advice in finding_rows(inspection.findings):
        lines += wrapped(f"{'WARNING ' if level == 'warning' else ''}{seen}", _WIDTH, "  ", "    ")
        lines += wrapped(where, _WIDTH, "    ", "    ") + wrapped(advice, _WIDTH, "    ", "    ")
    for kind, count in inspection.suspicious_counts.items():
        if count and top > 0:
            lines += [
                "",
                *wrapped(f"Suspicious ({kind}): {count} pairs; {RULES[kind]}", _WIDTH, "", "  "),
            ]
            for pair in inspection.suspicious(top, kind):
                lines += wrapped(f"row {pair.row}: {pair.why}", _WIDTH, "  ", "    ")
                lines += [_one_line(f"    {mark} {t}") for mark, t in _marked(pair)]
    return "\n".join(line.rstrip() for line in lines)


def _marked(pair: SuspiciousPair) -> list[tuple[str, str]]:
    return [(">", pair.prompt), ("+", pair.chosen), ("-", pair.rejected)]


def _one_line(line: str) -> str:
    shown = " ".join(printable(line[: 4 * _WIDTH]).split())
    shown = "    " + shown
    return shown if len(shown) <= _WIDTH else shown[: _WIDTH - 4] + " ..."


def _columns(head: Sequence[str], rows: Rows) -> list[str]:
    return [f"  {line}" for line in text_table(head, rows, right=range(1, len(head)))]


def html(inspection: InspectionFacts, top: int) -> str:
    """Everything for a notebook."""
    return "".join(f"<h4>{escaped(title)}</h4>{body}" for title, body in _sections(inspection, top))


def page(inspection: InspectionFacts, top: int) -> str:
    """Everything as one self-contained page."""
    data = inspection.data_report
    under = f" under {inspection.model_name}" if inspection.scores is not None else ""
    subtitle = f"{data.kept} of {data.total} rows{under}, {len(inspection.findings)} findings"
    sections = _sections(inspection, top)
    if inspection.scores is not None:
        options = [(name, getattr(inspection.args, name)) for name in OPTIONS]
        sections.append(("Options", html_table(("option", "value"), options)))
    return html_page(f"rmipo_lite inspection: {data.source}", subtitle, sections)


def _sections(inspection: InspectionFacts, top: int) -> list[tuple[str, str]]:
    head = ("", "p5", "p50", "p95", "max")
    sections = [
        ("Data", html_table(("", ""), facts(inspection)) + html_table(head, lengths(inspection)))
    ]
    if inspection.scores is not None:
        head = ("", "mean", "p5", "p50", "p95")
        body = html_table(("", ""), model_facts(inspection)) + html_table(head, numbers(inspection))
        sections.append((f"Under {inspection.model_name}", body))
    sections.append(("Histograms", _histograms(inspection)))
    seen = finding_rows(inspection.findings)
    columns = ("level", "what was seen", "where", "what to do")
    sections.append(("Findings", html_table(columns, seen) if seen else "<p>None.</p>"))
    for kind, count in inspection.suspicious_counts.items():
        if count:
            pairs = inspection.suspicious(top, kind)
            body = f"<p>{count} pairs: {escaped(RULES[kind])}.</p>"
            body += html_table(("row", "prompt", "chosen", "rejected", "why"), _pair_rows(pairs))
            sections.append((f"Suspicious: {kind}", body))
    return sections


def _pair_rows(pairs: Sequence[SuspiciousPair]) -> Rows:
    return [
        (str(p.row), *(_cut(t) for t in (p.prompt, p.chosen, p.rejected)), p.why) for p in pairs
    ]


def _cut(shown: str) -> str:
    return shown if len(shown) <= _TEXT_SHOWN else shown[: _TEXT_SHOWN - 4] + " ..."


class _Quantity(NamedTuple):
    title: str
    unit: str
    values: NDArray[Any]  # of the pairs that have it


def _quantities(inspection: InspectionFacts) -> list[_Quantity]:
    """What the model says of every pair that is finite."""
    if inspection.scores is None:
        return []
    finite, args = inspection.scores.finite, inspection.args
    column = {name: values[finite] for name, values in inspection.scores.columns.items()}
    chosen, rejected = column["chosen_logps"], column["rejected_logps"]
    first = ("log-prob gap", "nats per token", chosen - rejected)
    if args.loss.unpaired:
        own = np.where(inspection.scores.labels[finite] == 1, chosen, rejected)
        first = ("log-prob", "nats per token", own)
    found = [
        first,
        ("PMI gap", "nats per token", column["chosen_pmi"] - column["rejected_pmi"]),
        (
            "gamma",
            "nats per token" if args.gamma_scaled_by_beta else "reward units",
            column["gamma"],
        ),
        ("loss weight", "0 to 1", column["weight"]),
        ("loss", "nats", column["loss"]),
    ]
    if isinstance(args.loss, SumLoss):  # it has no margin of its own
        found = [quantity for quantity in found if quantity[0] != "gamma"]
    known = [_Quantity(title, unit, values[np.isfinite(values)]) for title, unit, values in found]
    return [quantity for quantity in known if len(quantity.values)]


def _panels(inspection: InspectionFacts) -> list[Callable[[Axes], None]]:
    """What each panel of the figure draws."""
    drawn: list[Callable[[Axes], None]] = [
        partial(_draw, "Response length", inspection.unit, {
            side: inspection.lengths_of(side) for side in ("chosen", "rejected")
        }),
        partial(_draw, "Prompt length", inspection.unit, {
            "": inspection.lengths_of("prompt")
        }),
    ]  # fmt: skip
    for title, unit, values in _quantities(inspection):
        if title != "loss":  # it says what gap and gamma say
            drawn.append(partial(_draw, title[0].upper() + title[1:], unit, {"": values}))
    return drawn


def _draw(title: str, unit: str, series: dict[str, NDArray[Any]], axes: Axes) -> None:
    """Histograms over one range; the outermost bins hold what lies beyond it."""
    together = np.concatenate(list(series.values()))
    low, high = np.percentile(together, (_TAIL, 100 - _TAIL))
    if low == high:
        low, high = low - 0.5, high + 0.5
    for label, values in series.items():
        counts, edges = np.histogram(np.clip(values, low, high), _BINS, (low, high))
        axes.stairs(counts, edges, fill=True, alpha=0.5, label=label)
    axes.set(title=title, xlabel=unit, ylabel="pairs")
    axes.grid(visible=True, alpha=0.3)
    if low < 0 < high:
        axes.axvline(0, color="0.5", linewidth=1)
    if len(series) > 1:
        axes.legend(fontsize="small")


def figure(inspection: InspectionFacts) -> Figure:
    """All histograms in one figure."""
    panels = _panels(inspection)
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    drawn = plots.new_figure(4 * columns, 2.8 * rows)
    for place, draw in enumerate(panels, start=1):
        draw(drawn.add_subplot(rows, columns, place))
    return drawn


def _histograms(inspection: InspectionFacts) -> str:
    """The panels as SVG."""
    return plots.beside([plots.svg_panel(draw) for draw in _panels(inspection)])
