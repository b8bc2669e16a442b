"""One HTML file that shows a run: metrics before and after, curves, data report, samples."""

from collections.abc import Sequence

from rmipo_lite.model.names import short_name
from rmipo_lite.output import plots
from rmipo_lite.output.page import html_page
from rmipo_lite.output.table import html_table
from rmipo_lite.results.comparison import AnswerComparison
from rmipo_lite.results.model_card import METRIC_HEAD, metric_rows, run_options
from rmipo_lite.results.record import RunRecord


def curves(history: plots.History) -> str:
    """The run's curves, as many beside each other as the page has room for."""
    return plots.beside(plots.svgs(history))


def report_html(
    result: RunRecord,
    comparison: AnswerComparison | None = None,
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
        ("Findings", result.findings._repr_html_()),
        (
            "Held-out metrics",
            html_table(METRIC_HEAD, rows) if rows else "<p>None was measured.</p>",
        ),
        *extra_sections,
        ("Curves", curves(result.history)),
    ]
    if comparison is not None and len(comparison):
        sections.append(("Samples", comparison._repr_html_()))
    sections += [
        ("Data", html_table(("fact", "value"), result.data_report.facts())),
        ("Options", html_table(("option", "value"), list(run_options(result).items()))),
    ]
    title = f"rmipo_lite run: {short_name(result.base_model_name) or result.output_dir.name}"
    return html_page(title, result.headline, sections)
