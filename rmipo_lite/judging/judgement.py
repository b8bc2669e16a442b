"""`Judgement`: how often a model's answers were preferred to others', and what that is worth."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rmipo_lite.model.generation import Answer, Prompt, prompt_text
from rmipo_lite.output.console import printable
from rmipo_lite.output.table import escaped, html_table
from rmipo_lite.output.uncertainty import bootstrap, wilson
from rmipo_lite.system.files import refuse_existing, write_whole

if TYPE_CHECKING:
    import pandas as pd

_SHOWN = 6  # pairs of a printed judgement
_WIDE = 70  # characters of an answer in a line


class Judged(NamedTuple):
    """One prompt with both answers. `won` is 1, 0.5 where neither did, 0, or NaN: no verdict."""

    prompt: Prompt
    answer: Answer
    other: Answer
    won: float

    @property
    def verdict(self) -> str:
        """In a word."""
        return {1.0: "won", 0.5: "tied", 0.0: "lost"}.get(self.won, "no verdict")


@dataclass(frozen=True, repr=False)
class Judgement:
    """Verdicts over prompts; prints as text, shows as a table in a notebook.

    Attributes:
        against: whom the others are from, in words.
        pairs: every prompt with both answers and its verdict, to read.
        tokens: mean length of the answers and of the others, tokens.
        longer: share of prompts whose answer is the longer one, of those that differ in length;
            NaN where none does.
    """

    against: str
    pairs: list[Judged]
    tokens: tuple[float, float]
    longer: float

    @staticmethod
    def of(pairs: Sequence[Judged], against: str, lengths: Sequence[tuple[int, int]]) -> Judgement:
        """With the lengths (answer, other) of each pair, tokens."""
        mine, theirs = zip(*lengths, strict=True)
        apart = [float(one > other) for one, other in lengths if one != other]
        longer = statistics.fmean(apart) if apart else math.nan
        means = statistics.fmean(mine), statistics.fmean(theirs)
        return Judgement(against, list(pairs), means, longer)

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[Judged]:
        return iter(self.pairs)

    @property
    def wins(self) -> list[float]:
        """Of the prompts that have a verdict."""
        return [pair.won for pair in self.pairs if not math.isnan(pair.won)]

    @property
    def win_rate(self) -> float:
        """Share of prompts won, ties half; NaN without a verdict."""
        return statistics.fmean(self.wins) if self.wins else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Of the win rate, 95 %, by bootstrap over prompts.

        Where all verdicts are alike drawing them again says nothing, and it is Wilson's.
        """
        wins = self.wins
        if not wins:
            return math.nan, math.nan
        return wilson(wins[0], len(wins)) if len(set(wins)) == 1 else bootstrap(wins)

    def counts(self) -> dict[str, int]:
        """How many were won, tied, lost, and without a verdict."""
        said = [pair.verdict for pair in self.pairs]
        return {word: said.count(word) for word in ("won", "tied", "lost", "no verdict")}

    @property
    def headline(self) -> str:
        """In one line."""
        counts = self.counts()
        missing = counts.pop("no verdict")
        parts = [f"against {self.against}: " + ", ".join(f"{n} {w}" for w, n in counts.items())]
        if missing:
            parts.append(f"{missing} without a verdict")
        if self.wins:
            low, high = self.interval
            parts.append(f"win rate {self.win_rate:.0%} ({100 * low:.0f} to {high:.0%})")
        mine, theirs = self.tokens
        longer = "" if math.isnan(self.longer) else f", longer in {self.longer:.0%}"
        parts.append(f"{mine:.0f} against {theirs:.0f} tokens{longer}")
        cut = [sum(not side.ended for side in sides) for sides in self._sides()]
        if any(cut):
            parts.append(f"{cut[0]} and {cut[1]} answers cut")
        return "; ".join(parts)

    def _sides(self) -> tuple[list[Answer], list[Answer]]:
        return [pair.answer for pair in self.pairs], [pair.other for pair in self.pairs]

    def __str__(self) -> str:
        lines = [self.headline]
        for pair in self.pairs[:_SHOWN]:
            lines.append(f"> {_line(prompt_text(pair.prompt))}")
            lines += [
                f"  {pair.verdict:<10} {_line(pair.answer)}",
                f"  {'':<10} {_line(pair.other)}",
            ]
        if len(self) > _SHOWN:
            lines.append(
                f"... and {len(self) - _SHOWN} more: for pair in judgement, or write(path)"
            )
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = [(prompt_text(p), str(a), str(b), Judged(p, a, b, w).verdict) for p, a, b, w in self]
        head = ("prompt", "answer", self.against, "")
        return f"<p>{escaped(self.headline)}</p>" + html_table(
            head, rows[:_SHOWN], ("24%", "33%", "33%", "10%")
        )

    def to_pandas(self) -> pd.DataFrame:
        """A row a prompt."""
        import pandas as pd

        return pd.DataFrame(self._rows())

    def write(self, path: str | Path) -> Path:
        """Every pair with its verdict as a line of JSON; returns the file.

        Raises:
            FileExistsError: there is such a file.
        """
        target = Path(path)
        refuse_existing(target)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in self._rows()]
        write_whole(target, "".join(lines))
        return target

    def _rows(self) -> list[dict[str, Any]]:
        return [
            {
                "prompt": pair.prompt, "answer": str(pair.answer), "other": str(pair.other),
                "won": None if math.isnan(pair.won) else pair.won,
                "answer_ended": pair.answer.ended, "other_ended": pair.other.ended,
            }
            for pair in self.pairs
        ]  # fmt: skip


def _line(text: str) -> str:
    shown = " ".join(printable(text).split())
    return shown if len(shown) <= _WIDE else shown[: _WIDE - 4] + " ..."
