"""Cases of check 35 on what is shown: texts from data that a page or a terminal would carry out."""

from __future__ import annotations

import html.parser
import io
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from rmipo_lite.config import RMiPOConfig
from rmipo_lite.data.rows import load_rows
from rmipo_lite.model.generation import Answer
from rmipo_lite.output.console import say
from rmipo_lite.results.comparison import AnswerComparison
from rmipo_lite.results.model_card import model_card
from rmipo_lite.results.result import TrainResult
from rmipo_lite.results.run_page import report_html
from tests.kit import tiny_model
from tests.trials.data.hostile_data import Bench
from tests.trials.scorecard import expect

_ROW = {"prompt": "Hi", "chosen": "yes", "rejected": "no"}
_MARKUP = "</td></pre><script>alert(1)</script><img src=x onerror=alert(1)>'\"&"
_TERMINAL = "\x1b[2J\x1b]0;title\x07\x9b31m\x00\x08\u202e\u2066\r\x7f"
_TAGS = {
    "table", "thead", "tbody", "tr", "th", "td", "p", "b", "div", "h1",
    "h2", "html", "wbr", "head", "meta", "title", "style", "body", "a", "svg", "g", "path",
    "defs", "use", "rect", "text", "clippath", "metadata", "rdf:rdf", "cc:work", "dc:type",
    "dc:date", "dc:format", "dc:creator", "cc:agent", "dc:title", "line", "polyline", "circle",
}  # fmt: skip


class _Tags(html.parser.HTMLParser):
    """The tags of a page, and attributes that would run something."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.handlers: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.add(tag)
        self.handlers |= {name for name, _ in attrs if name.startswith("on")}


def _shown(hostile: str, folder: Path) -> TrainResult:
    """A result in which every text that comes from elsewhere is hostile."""
    odd_type = type(hostile.replace("\0", ""), (), {})
    odd_row = _ROW | {"chosen": odd_type()}
    _, report = load_rows([_ROW, _ROW | {hostile: "a"}, {hostile: 3}, odd_row])
    report.source = report.source + hostile
    report.refuse(9, f"reason {hostile}", hostile)
    report.notes.append(hostile)
    model = tiny_model()
    model.config._name_or_path = hostile
    result = TrainResult(
        model=model,
        tokenizer=None,
        args=RMiPOConfig(str(folder / "run"), use_cpu=True, chat_template="{" + hostile),
        metrics={"eval_loss": 1.0, f"eval_{hostile}_loss": 1.0},
        metrics_before={"eval_loss": 2.0},
        history=[{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5, f"eval_{hostile}": 1.0}],
        data_report=report,
        output_dir=Path("run" + hostile),
    )
    prompts: list[Any] = [hostile, [{"role": hostile, "content": hostile}]]
    result._samples = AnswerComparison(prompts, [Answer(hostile)] * 2, [Answer(hostile)] * 2)
    return result


def _markup(bench: Bench) -> None:
    """HTML from data stays text, in a notebook, in the report's file and in the model's card."""
    result = _shown(_MARKUP, bench.folder)
    samples = result._samples
    assert samples is not None
    pages = {
        "DataReport": result.data_report._repr_html_(),
        "Comparison": samples._repr_html_(),
        "TrainResult": result._repr_html_(),
        "the report": report_html(result, samples, [(_MARKUP, "<p>safe</p>")]),
    }
    for name, page in pages.items():
        tags = _Tags()
        tags.feed(page)
        expect(tags.found <= _TAGS, f"{name} has {tags.found - _TAGS}")
        expect(not tags.handlers, f"{name} has {tags.handlers}")
        expect("&lt;script&gt;" in page, f"{name} doesn't show the text")
    heading = next(line for line in model_card(result).splitlines() if line.startswith("# "))
    heading = heading.removesuffix(", trained in full")
    expect(heading.count("`") == 2 and heading.endswith("`"), f"the card's heading: {heading}")


def _escape_codes(bench: Bench) -> None:
    """Nothing that a terminal would carry out is printed."""
    result = _shown(_TERMINAL, bench.folder)
    out = io.StringIO()
    with redirect_stdout(out):
        say(str(result.data_report))
        say(str(result._samples))
        say(repr(result))
        say(_TERMINAL)
    shown = {
        "DataReport": str(result.data_report),
        "Comparison": str(result._samples),
        "TrainResult": repr(result),
        "say": out.getvalue(),
        "the card": model_card(result),
        "a page": report_html(result, result._samples),
    }
    for name, text in shown.items():
        found = {c for c in text if not c.isprintable() and c not in "\n\t"}
        expect(not found, f"{name} has {sorted(map(ascii, found))}")


CASES: dict[str, Callable[[Bench], None]] = {
    "markup in data": _markup,
    "escape codes in data": _escape_codes,
}
