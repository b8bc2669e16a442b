"""What became of every row of a dataset: the numbers shown before training starts.

Every row ends in exactly one of three places: kept, dropped (a sound row that cannot teach
anything: an empty answer, an identical pair) or refused (a faulty row: a number where text
belongs). The three counts add up to the input, and every reason keeps the numbers of its rows, so
that a user can go and look. The report holds no texts but short examples.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rmipo_lite.data.length_balance import WEIGHED, LengthBalance
from rmipo_lite.output.table import html_table, labelled
from rmipo_lite.output.uncertainty import share_text, wilson

ROWS_SHOWN = 5  # row numbers that are printed for each reason; the report holds all of them
EXAMPLE_CHARS = 300  # longest example text stored with a reason
LENGTH_BIAS_SHARE = 0.6  # above it the length of the chosen side is a warning
_EVEN = 0.5  # what it would be by chance
REFUSED_SHARE = 0.5  # above it the refused rows stand first among the warnings
PERCENTILES = (5, 50, 95)


def shortened(text: str, limit: int = EXAMPLE_CHARS) -> str:
    """`text` on one line: control characters become spaces, at most `limit` characters long."""
    cut = text if len(text) <= limit else text[: limit - 4] + " ..."
    return "".join(c if c.isprintable() else " " for c in cut)


def name_rows(numbers: Iterable[int]) -> str:
    """The first row numbers as text."""
    first = list(itertools.islice(numbers, ROWS_SHOWN + 1))
    return ", ".join([*map(str, first[:ROWS_SHOWN]), *["..."] * (len(first) > ROWS_SHOWN)])


@dataclass
class Tally:
    """How often one reason occurred, in which rows, and an example."""

    count: int = 0
    # First and last row of every run of neighbours: a reason that a whole file has is one of them.
    ranges: list[tuple[int, int]] = field(default_factory=list)
    example: str = ""

    def add(self, row: int, example: str = "") -> None:
        """Count one more row and note its 0-based number."""
        self.count += 1
        if self.ranges and self.ranges[-1][1] == row - 1:
            self.ranges[-1] = (self.ranges[-1][0], row)
        else:
            self.ranges.append((row, row))
        self.example = self.example or shortened(example)

    def numbers(self) -> Iterator[int]:
        """The 0-based numbers of its rows, in the order they were met."""
        for first, last in self.ranges:
            yield from range(first, last + 1)

    @property
    def rows(self) -> list[int]:
        """All of `numbers()`."""
        return list(self.numbers())


@dataclass(repr=False)
class DataReport:
    """What became of every row, and how long the texts are. Lengths are in tokens."""

    source: str = ""
    shown_source: str = ""  # without the folders it lies in, for whoever reads cards and reports
    argument: str = "dataset"  # what the caller calls it
    total: int = 0  # rows that came in
    kept: int = 0
    dropped: dict[str, Tally] = field(default_factory=dict)  # sound, but nothing to learn from
    refused: dict[str, Tally] = field(default_factory=dict)  # faulty
    distinct_prompts: int = 0
    identical_pairs: int = 0  # chosen == rejected, as text or after truncation
    duplicate_rows: int = 0  # the same pair as an earlier row; kept
    responses_repeating_prompt: int = 0  # both responses begin with the prompt's text; kept
    lengths: dict[str, dict[str, float]] = field(default_factory=dict)  # before truncation
    truncated_pairs: int = 0
    truncated_prompts: int = 0
    truncated_responses: int = 0
    chosen_longer_pairs: int = 0
    length_balance: LengthBalance | None = None  # None where no pair was tokenised
    desirable: int = 0  # of unpaired rows, which have a label
    undesirable: int = 0
    special_token_rows: int = 0  # user text that holds the text of a control token
    template_stripped: int = 0  # answers whose outer whitespace the chat template removed
    template_rewritten: int = 0  # answers that the chat template changed otherwise
    read_as: list[str] = field(default_factory=list)  # columns that are more than they look
    has_system: bool = False  # a system column, for which every row became messages
    ignored_columns: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def drop(self, row: int, reason: str, example: str = "") -> None:
        """Count a row as dropped (the caller adjusts `kept`)."""
        self.dropped.setdefault(reason, Tally()).add(row, example)

    def refuse(self, row: int, reason: str, example: str = "") -> None:
        """Count a row as refused (the caller adjusts `kept`)."""
        self.refused.setdefault(reason, Tally()).add(row, example)

    @property
    def dropped_count(self) -> int:
        return sum(tally.count for tally in self.dropped.values())

    @property
    def refused_count(self) -> int:
        return sum(tally.count for tally in self.refused.values())

    @property
    def share_truncated(self) -> float:
        """Share of the kept pairs that lost a token to `max_length`."""
        return self.truncated_pairs / self.kept if self.kept else 0.0

    @property
    def share_chosen_longer(self) -> float:
        """Share of the kept pairs whose chosen response has more tokens."""
        return self.chosen_longer_pairs / self.kept if self.kept else 0.0

    @property
    def is_unpaired(self) -> bool:
        """Whether its rows have a completion and a label."""
        return self.desirable + self.undesirable > 0

    @property
    def cases(self) -> str:
        """What its rows are."""
        return "rows" if self.is_unpaired else "pairs"

    @property
    def has_length_bias(self) -> bool:
        """Whether the chosen side is the longer one more often than chance and sense explain."""
        share = self.share_chosen_longer
        return share > LENGTH_BIAS_SHARE and wilson(share, self.kept)[0] > _EVEN

    def check(self) -> None:
        """Raise AssertionError unless kept + dropped + refused equals the input."""
        parts = (self.kept, self.dropped_count, self.refused_count)
        assert sum(parts) == self.total, (
            f"DataReport: kept {parts[0]} + dropped {parts[1]} + refused {parts[2]} "
            f"is not the input of {self.total} rows"
        )

    def set_lengths(self, **columns: Sequence[int]) -> None:
        """Store percentiles and maximum of token counts, one keyword for each text column."""
        for name, values in columns.items():
            ordered = sorted(values)
            if ordered:
                ranks = {f"p{p}": ordered[round(p / 100 * (len(ordered) - 1))] for p in PERCENTILES}
                self.lengths[name] = {**ranks, "max": ordered[-1]}

    @property
    def warnings(self) -> list[str]:
        """Plain sentences on what a user should look at before training."""
        lines: list[str] = []
        if self.total and self.refused_count > REFUSED_SHARE * self.total:
            lines.append(
                f"MOST ROWS ARE REFUSED: {self.refused_count} of {self.total}. "
                "Look at the reasons before trusting this run."
            )
        if self.has_length_bias:
            longer = share_text(self.share_chosen_longer, self.kept)
            lines.append(
                f"the chosen response is longer in {longer} of the pairs: {self._length_advice}"
            )
        if self.special_token_rows:
            lines.append(
                f"{self.special_token_rows} rows hold the text of a control token "
                "(it becomes that token)"
            )
        if self.responses_repeating_prompt:
            lines.append(
                f"in {self.responses_repeating_prompt} rows both responses begin with the prompt"
            )
        if self.template_rewritten:
            lines.append(f"the chat template rewrote {self.template_rewritten} answers")
        return lines + self.notes

    @property
    def _length_advice(self) -> str:
        balance = self.length_balance
        if balance is None or not balance.is_used:
            return "training can learn to write long answers, or answers that never end"
        advice = WEIGHED
        if balance.is_strong:
            advice += (
                f", which leaves {balance.effective:.0%} of the sample; if longer is what is "
                "meant, length_balance='off' keeps it"
            )
        return advice

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-able values, the shares and warnings included."""
        tallies = {
            kind: {
                reason: {"count": tally.count, "rows": tally.rows, "example": tally.example}
                for reason, tally in reasons.items()
            }
            for kind, reasons in (("dropped", self.dropped), ("refused", self.refused))
        }
        return asdict(self) | {
            **tallies,
            "share_truncated": self.share_truncated,
            "share_chosen_longer": self.share_chosen_longer,
            "warnings": self.warnings,
        }

    def facts(self) -> list[tuple[str, str]]:
        """(label, value) lines that the text and the HTML form share."""
        facts = [("source", shortened(self.shown_source or self.source, 120))]
        facts.append(
            (
                "rows",
                f"{self.total} in = {self.kept} kept + {self.dropped_count} dropped "
                f"+ {self.refused_count} refused",
            )
        )
        if self.is_unpaired:
            facts.append(("labels", f"{self.desirable} desirable, {self.undesirable} undesirable"))
        for kind, tallies in (("dropped", self.dropped), ("refused", self.refused)):
            for reason, tally in sorted(tallies.items(), key=lambda item: -item[1].count):
                facts.append((kind, _tally_line(reason, tally)))
        for name, ranks in self.lengths.items():
            figures = "  ".join(f"{rank} {count:g}" for rank, count in ranks.items())
            facts.append((f"{name} tokens", figures))
        if self.lengths:
            longer = share_text(self.share_chosen_longer, self.kept) if self.kept else "0%"
            if not self.is_unpaired:
                facts.append(("chosen longer", f"{longer} of the pairs"))
            if self.length_balance is not None:
                facts.append(("length balance", str(self.length_balance)))
            facts.append(
                (
                    "cut",
                    f"{self.share_truncated:.1%} of the {self.cases} "
                    f"({self.truncated_prompts} prompts, {self.truncated_responses} responses)",
                )
            )
        counts = [
            ("distinct prompts", self.distinct_prompts),
            ("identical pairs", self.identical_pairs),
            ("duplicate rows", self.duplicate_rows),
            ("whitespace cut", self.template_stripped),
        ]
        facts += [(label, str(count)) for label, count in counts if count]
        facts += [("read as", shortened(line)) for line in self.read_as]
        if self.ignored_columns:
            facts.append(("not used", shortened(", ".join(self.ignored_columns))))
        return facts + [("WARNING", shortened(line, 400)) for line in self.warnings]

    def __str__(self) -> str:
        return "\n".join(labelled([("Data", ""), *self.facts()], 17))

    # As the last value of a cell, or at a prompt, its lines are what a reader wants.
    __repr__ = __str__

    def _repr_html_(self) -> str:
        """The same lines as a small table; every text escaped."""
        return html_table((), self.facts())


def _tally_line(reason: str, tally: Tally) -> str:
    example = f"; e.g. {tally.example}" if tally.example else ""
    return f"{tally.count}: {shortened(reason)} (rows {name_rows(tally.numbers())}){example}"
