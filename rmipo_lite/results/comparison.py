"""Answers before and after training, side by side: as text and as a table in a notebook."""

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from rmipo_lite.model.generation import Answer, Prompt, prompt_text
from rmipo_lite.output.console import printable
from rmipo_lite.output.table import html_table

COLUMN = 46  # characters of one column in the text table


@dataclass(frozen=True)
class AnswerComparison:
    """Answers before and after training: prints side by side, and as a table in a notebook.

    An answer that the limit of tokens cut short ends in "[cut]".
    """

    prompts: list[Prompt]
    before: list[Answer]
    after: list[Answer]

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[tuple[Prompt, Answer, Answer]]:
        return iter(zip(self.prompts, self.before, self.after, strict=True))

    @property
    def cut(self) -> tuple[int, int]:
        """How many answers were cut short, before and after."""
        return sum(not a.ended for a in self.before), sum(not a.ended for a in self.after)

    def __str__(self) -> str:
        lines: list[str] = []
        for prompt, before, after in self:
            lines += textwrap.wrap("> " + printable(prompt_text(prompt)), 2 * COLUMN + 3)
            left = ["before", *_wrapped(_shown(before))]
            right = ["after", *_wrapped(_shown(after))]
            height = max(len(left), len(right))
            left += [""] * (height - len(left))
            right += [""] * (height - len(right))
            lines += [f"{a:<{COLUMN}} | {b}".rstrip() for a, b in zip(left, right, strict=True)]
            lines.append("")
        return "\n".join(lines).rstrip()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = [(prompt_text(p), _shown(before), _shown(after)) for p, before, after in self]
        return html_table(("prompt", "before", "after"), rows, ("24%", "38%", "38%"))


def _shown(answer: Answer) -> str:
    return answer if answer.ended else f"{answer} [cut]"


def _wrapped(text: str) -> list[str]:
    lines = [
        part
        for line in printable(text).splitlines()
        for part in textwrap.wrap(line, COLUMN) or [""]
    ]
    return lines or ["(empty)"]
