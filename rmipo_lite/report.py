"""One HTML file that shows a run: metrics before and after, curves, data report, samples.

Self-contained on purpose (no script, no font, no link out), so that it can be mailed and opens
anywhere, on a phone and in the dark. Every text that comes from data is escaped.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rmipo_lite import __version__, plots
from rmipo_lite.display import printable
from rmipo_lite.generation import Comparison
from rmipo_lite.loading import short_name
from rmipo_lite.model_card import metric_rows, run_options
from rmipo_lite.redaction import redact_text

if TYPE_CHECKING:
    from rmipo_lite.result import TrainResult

_STYLE = """
:root { color-scheme: light dark; --bg: #fff; --fg: #1b1f24; --line: #d5dae0 }
@media (prefers-color-scheme: dark) {
  :root { --bg: #14171a; --fg: #e3e7eb; --line: #3a424a }
}
body { background: var(--bg); color: var(--fg); font: 16px/1.5 system-ui, sans-serif;
       max-width: 62rem; margin: 0 auto; padding: 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; width: 100% }
th, td { border-bottom: 1px solid var(--line); padding: .35rem .6rem; text-align: left;
         vertical-align: top; overflow-wrap: break-word }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap }
"""

_NUMBER = re.compile(r"[-+\d.,%e]+")
_BREAKS = re.compile(r"(?<=[/_])(?=\w)")


def escaped(text: object) -> str:
    """Text for an HTML page: secrets redacted, control characters shown, markup escaped."""
    return html.escape(printable(redact_text(str(text))))


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """An HTML table of escaped texts that scrolls sideways on a narrow screen."""
    top = "".join(f"<th>{escaped(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(_cell(value) for value in r) + "</tr>" for r in rows)
    return f'<div class="wide"><table><tr>{top}</tr>{body}</table></div>'


def _cell(value: object) -> str:
    if _NUMBER.fullmatch(str(value)):
        return f'<td class="number">{escaped(value)}</td>'
    # Where a narrow screen may break a name such as rewards/accuracies.
    return f"<td>{_BREAKS.sub(r'<wbr>', escaped(value))}</td>"


def _samples(comparison: Comparison) -> str:
    return f'<div class="wide">{comparison._repr_html_()}</div>'


def curves(history: plots.History) -> str:
    """The run's curves, as many beside each other as the page has room for."""
    return plots.beside(plots.svgs(history))


def report_html(
    result: TrainResult,
    comparison: Comparison | None = None,
    extra_sections: Sequence[tuple[str, str]] = (),
) -> str:
    """The page as text.

    Args:
        result: the run.
        comparison: samples to show, if any.
        extra_sections: (title, HTML) pairs put after the metrics; the title is escaped, the HTML
            is taken as it is and must be safe.
    """
    rows = metric_rows(result)
    sections: list[tuple[str, str]] = [
        ("Findings", f'<div class="wide">{result.findings._repr_html_()}</div>'),
        (
            "Held-out metrics",
            table(("metric", "before", "after"), rows) if rows else "<p>None was measured.</p>",
        ),
        *extra_sections,
        ("Curves", curves(result.history)),
    ]
    if comparison is not None and len(comparison):
        sections.append(("Samples", _samples(comparison)))
    sections += [
        ("Data", table(("fact", "value"), result.data_report.facts())),
        ("Options", table(("option", "value"), list(run_options(result.args).items()))),
    ]
    title = f"rmipo_lite run: {short_name(result.base_model_name) or result.output_dir.name}"
    return page(title, result.headline, sections)


def page(title: str, subtitle: str, sections: Sequence[tuple[str, str]]) -> str:
    """A whole page; titles are escaped, the sections' HTML is taken as it is and must be safe."""
    body = "".join(f"<h2>{escaped(name)}</h2>{content}" for name, content in sections)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escaped(title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{escaped(title)}</h1><p>{escaped(subtitle)}</p>{body}"
        f"<p>Made with rmipo_lite {escaped(__version__)}.</p></body></html>\n"
    )


def write_report(path: str | Path, page: str) -> Path:
    """Write the page; the folder is made when missing."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page, encoding="utf-8")
    return target
