"""A self-contained HTML page of sections, written to one file.

No script, no font, no link out, so that it can be mailed and opens
anywhere, on a phone and in the dark. Every text that comes from data is escaped.
"""

from collections.abc import Sequence
from pathlib import Path

from rmipo_lite.output.table import escaped
from rmipo_lite.system.files import is_reserved
from rmipo_lite.version import __version__

RUN_FILE = "run.html"  # a run's page
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


def html_page(title: str, subtitle: str, sections: Sequence[tuple[str, str]]) -> str:
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
    """Write the page; the folder is made when missing.

    Raises:
        ValueError: Windows keeps this name for itself.
    """
    target = Path(path)
    if is_reserved(target):
        raise ValueError(f"path: wanted a file to write to, got {str(target)!r}")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page, encoding="utf-8")
    return target
