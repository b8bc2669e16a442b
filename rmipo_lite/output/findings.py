"""What is wrong with a run, in plain words: `Finding`, and the list that a result shows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from rmipo_lite.output.table import escaped, html_table, wrapped

_WIDTH = 96  # characters of a line
_NONE = "Findings: none"


@dataclass(frozen=True)
class Finding:
    """One thing that a user should know about a run.

    Attributes:
        name: which symptom, e.g. "swapped_labels".
        text: what was seen, with its numbers.
        advice: what to do about it.
        level: "warning", or "note" for what can be normal.
        steps: first and last optimizer step at which it was seen; 0 is before training.
    """

    name: str
    text: str
    advice: str
    level: Literal["warning", "note"] = "warning"
    steps: tuple[int, int] = (0, 0)

    @property
    def when(self) -> str:
        first, last = self.steps
        if last == 0:
            return "before training"
        return f"step {last}" if first == last else f"steps {first} to {last}"

    def __str__(self) -> str:
        mark = "WARNING" if self.level == "warning" else "Note"
        return f"{mark} ({self.when}): {self.text}. {self.advice}."


class Findings(Sequence[Finding]):
    """The findings of a run in the order they were made; prints as text, shows as a table."""

    def __init__(self, findings: Sequence[Finding] = ()) -> None:
        self._findings = tuple(findings)

    def __getitem__(self, place: int) -> Finding:  # type: ignore[override]
        return self._findings[place]

    def __len__(self) -> int:
        return len(self._findings)

    def __iter__(self) -> Iterator[Finding]:
        return iter(self._findings)

    @property
    def names(self) -> list[str]:
        """The symptoms that were found."""
        return [finding.name for finding in self]

    def __str__(self) -> str:
        if not self:
            return _NONE
        return "\n".join(
            line for finding in self for line in wrapped(str(finding), _WIDTH, later="  ")
        )

    __repr__ = __str__

    def rows(self) -> list[tuple[str, str, str]]:
        """(level and steps, what was seen, what to do) as texts."""
        return [(f"{f.level}, {f.when}", f"{f.text}.", f"{f.advice}.") for f in self]

    def _repr_html_(self) -> str:
        if not self:
            return f"<p>{escaped(_NONE)}</p>"
        return html_table(("when", "what was seen", "what to do"), self.rows())
