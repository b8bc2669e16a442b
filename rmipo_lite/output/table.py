"""One table, as text and as HTML: what reports, estimates and comparisons are shown in."""

import html
import re
import textwrap
from collections.abc import Iterable, Sequence

from rmipo_lite.output.console import printable
from rmipo_lite.output.redaction import redact_text

_NUMBER = re.compile(r"[-+\d.,%e]+")
_BREAKS = re.compile(r"(?<=[/_])(?=\w)")
# In the cells themselves: a notebook has its own style, and many viewers take a page's away.
_CELL = "text-align:left;vertical-align:top;white-space:pre-wrap"


def escaped(text: object) -> str:
    """Text for an HTML page: secrets redacted, control characters shown, markup escaped."""
    return html.escape(printable(redact_text(str(text))))


def html_table(
    head: Sequence[str], rows: Iterable[Sequence[object]], widths: Sequence[str] = ()
) -> str:
    """An HTML table of escaped texts that scrolls sideways on a narrow screen.

    Args:
        head: names of the columns; empty for a table without them.
        rows: a cell each; a line break in it stays one.
        widths: of the columns, as CSS; empty lets the browser choose.
    """
    sized = [f"width:{width}" for width in widths] or [""] * len(head)
    names = "".join(
        f'<th style="{_CELL};{size}">{escaped(name)}</th>'
        for name, size in zip(head, sized, strict=True)
    )
    top = f"<thead><tr>{names}</tr></thead>" if any(head) else ""
    body = "".join("<tr>" + "".join(_cell(value) for value in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table>{top}<tbody>{body}</tbody></table></div>'


def _cell(value: object) -> str:
    if _NUMBER.fullmatch(str(value)):
        return f'<td class="number" style="{_CELL};white-space:nowrap">{escaped(value)}</td>'
    # Where a narrow screen may break a name such as rewards/accuracies.
    return f'<td style="{_CELL}">{_BREAKS.sub("<wbr>", escaped(value))}</td>'


def text_table(
    head: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()
) -> list[str]:
    """Lines of aligned columns; those of the places in `right` stand to the right."""
    all_rows = [list(map(printable, row)) for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*all_rows, strict=True)]
    return [
        "  ".join(
            text.rjust(width) if place in right else text.ljust(width)
            for place, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in all_rows
    ]


def labelled(
    rows: Iterable[tuple[str, str]], label_width: int, width: int = 0, indent: str = ""
) -> list[str]:
    """`label  value` lines; values longer than `width` characters go on below, 0 leaves them."""
    lines = []
    for label, value in rows:
        first = f"{indent}{label:<{label_width}}"
        lines += wrapped(value, width, first, " " * len(first)) if width else [first + value]
    return [printable(line).rstrip() for line in lines]


def wrapped(text: str, width: int, first: str = "", later: str = "") -> list[str]:
    """A text in lines of at most `width` characters, `first` and `later` before them."""
    shown = " ".join(printable(text).split())
    return textwrap.wrap(shown, width, initial_indent=first, subsequent_indent=later)
