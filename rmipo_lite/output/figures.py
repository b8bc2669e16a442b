"""Several figures with their captions: shown in a notebook one under the other, or as files."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rmipo_lite.output.console import say
from rmipo_lite.output.table import escaped
from rmipo_lite.system.files import file_put_in_place, write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DOTS = 150  # an inch
_SHOWN_DOTS = 80


class Captioned(NamedTuple):
    """A figure of matplotlib's, and what it shows in words."""

    figure: Figure
    caption: str


@dataclass(repr=False)
class Figures(Mapping[str, "Captioned"]):
    """Figures by name.

    Attributes:
        named: name -> figure and caption.
        missing: name -> why there is none.
    """

    named: dict[str, Captioned]
    missing: dict[str, str]

    def __getitem__(self, name: str) -> Captioned:
        return self.named[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.named)

    def __len__(self) -> int:
        return len(self.named)

    def __str__(self) -> str:
        lines = [f"{name}: {one.caption}" for name, one in self.named.items()]
        return "\n".join(lines + [f"no {name}: {why}" for name, why in self.missing.items()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        shown = [
            f'<figure style="margin:0 0 1rem 0">{_picture(one.figure)}<figcaption>'
            f"{escaped(one.caption)}</figcaption></figure>"
            for one in self.named.values()
        ]
        left = [f"<p>No {name}: {escaped(why)}</p>" for name, why in self.missing.items()]
        return "".join(shown + left)

    def save(self, folder: str | Path) -> Path:
        """Write each as a PNG and their captions as Markdown, `captions.md`; returns the folder."""
        target = Path(folder)
        lines = []
        for name, one in self.named.items():
            with file_put_in_place(target / f"{name}.png") as staged:
                one.figure.savefig(staged, format="png", dpi=_DOTS, metadata={"Software": None})
            lines.append(f"![{name}]({name}.png)\n\n{one.caption}\n")
        lines += [f"No {name}: {why}\n" for name, why in self.missing.items()]
        write_whole(target / "captions.md", "\n".join(lines))
        said = f"Figures: {target}, {', '.join(self.named) or 'none'}"
        say("\n".join([said, *(f"no {name}: {why}" for name, why in self.missing.items())]))
        return target


def _picture(drawn: Figure) -> str:
    """In the page itself. A scatter of thousands of pairs would be far larger as SVG."""
    kept = io.BytesIO()
    drawn.savefig(kept, format="png", dpi=_SHOWN_DOTS, metadata={"Software": None})
    text = base64.b64encode(kept.getvalue()).decode("ascii")
    return f'<img style="max-width:100%" src="data:image/png;base64,{text}">'
