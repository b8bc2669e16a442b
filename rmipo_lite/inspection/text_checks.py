"""What is wrong with preference pairs as texts: no model, no tokenizer.

Every finding counts rows that a reader can look up and act on, and says what to do. What is normal
in some data (answers of one word, texts without a full stop) counts only where it is rare, or where
it stands on one side so much more often than on the other that a model would learn it as the
difference.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from typing import Literal

from rmipo_lite.data.report import Tally, shortened
from rmipo_lite.data.rows import Row, Texts, digest, repeating_prompt, texts_of
from rmipo_lite.inspection.near_duplicates import (
    ALMOST_EQUAL,
    THRESHOLD,
    near_duplicate_groups,
    similarity,
)
from rmipo_lite.output.findings import Finding

_RARE = 0.2  # share of rows up to which answers of one word are odd rather than the task
_EXAMPLE = 60  # characters of a text in an example
_SIGMAS = 3.0  # of a fair coin, from which one side has a mark more often than by chance
_MIN_ONE_SIDED = 0.02  # share of the rows below which such a mark is not worth a word

_CONTROL = (
    r"<\|(?:im_start|im_end|endoftext|eot_id|begin_of_text|end_of_text|start_header_id"
    r"|end_header_id|user|assistant|system|end)\|>"
    r"|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>"
)
_CONTROL_MARK = re.compile(_CONTROL)
_ROLE_MARK = re.compile(
    _CONTROL + r"|^[ \t]*#{2,3} ?(?:Response|Instruction|Input|Human|Assistant|User)\b"
    r"|^[ \t]*(?:Human|HUMAN|Assistant|ASSISTANT|User|USER)[ \t]?:"
    r"|(?<=[.!?])\s+(?:Human|Assistant)\s*\Z",  # of a transcript, cut before the colon
    re.MULTILINE,
)
_WORD = re.compile(r"\w")

# name -> (what was seen, what to do); "N rows: " stands in front
_ADVICE = {
    "duplicates": (
        "the same pair as an earlier row",
        "Remove them: they weigh double, and may stand in training and evaluation at once",
    ),
    "near_duplicates": (
        f"at least {THRESHOLD:.0%} of the three-word phrases are those of an earlier row",
        "Keep one of each group, or keep a group on one side of the split",
    ),
    "contradicting_labels": (
        "chosen and rejected stand swapped in another row with the same prompt",
        "Decide which label is right and remove the other row: together they teach nothing",
    ),
    "preference_cycles": (
        "the labels go round in a circle under one prompt (A over B, B over C, C over A; one "
        "circle for each prompt is counted)",
        "Look at these prompts: at least one label of each circle is wrong",
    ),
    "both_labels": (
        "a completion that is desirable in one row and undesirable in another with the same prompt",
        "Decide which label is right and remove the other row: together they teach nothing",
    ),
    "chosen_and_rejected": (
        "a response that is chosen in one row and rejected in another with the same prompt",
        "Normal where responses were ranked (A over B over C); else the labels disagree",
    ),
    "one_word": (
        "a response of one word or none",
        "Look at some: they may be placeholders or lost texts",
    ),
    "repeats_prompt": (
        "a response begins with its prompt",
        "Cut the prompt off the response, or the model learns to repeat the question",
    ),
    "role_marks": (
        "a role mark or template text stands inside a message",
        "Split such rows into messages, or remove the marks: the chat template writes its own",
    ),
    "prompt_ends_in_space": (
        "the prompt ends in a blank",
        "Strip it: tokenised with the blank, a response begins with tokens it never has elsewhere",
    ),
    "one_side_begins_blank": (
        "one response begins with whitespace, the other doesn't",
        "Strip both or neither: the blank alone tells chosen from rejected",
    ),
    "one_side_cut_off": (
        "one response alone ends without an end mark",
        "Look whether these were cut off: a model can learn the ending instead of the content",
    ),
    "almost_equal": (
        f"the two responses share at least {ALMOST_EQUAL:.0%} of their words, in order",
        "Look at them: such a pair trains on its few differing tokens alone",
    ),
}
_NOTES = {
    "near_duplicates",
    "chosen_and_rejected",
    "one_word",
    "almost_equal",
}  # can be right as they are


@dataclass(frozen=True)
class TextFinding(Finding):
    """One kind of trouble in the data, e.g. "near_duplicates".

    Attributes:
        tally: how many rows, which, and an example; empty where no row is to blame alone.
    """

    tally: Tally = field(default_factory=Tally)


@dataclass(frozen=True)
class TextReport:
    """What `check_texts` found.

    Attributes:
        findings: in the order of the checks; none for clean data.
        similarity: of chosen and rejected, for the rows where it is at least `ALMOST_EQUAL`.
        near_duplicates: row numbers of every group, the largest first.
    """

    findings: list[TextFinding]
    similarity: dict[int, float]
    near_duplicates: list[list[int]]


def check_texts(rows: Sequence[Row]) -> TextReport:
    """Look at every pair, and at pairs among each other.

    Memory is that of a few numbers for each row; time grows with the text, not with its square.
    """
    check = _Check(len(rows))
    for row in rows:
        check.add(row)
    groups = check.near_duplicates(rows)
    check.labels(rows)
    return TextReport(check.findings(), check.similarity, groups)


class _Check:
    """Gathers tallies row by row."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._tallies = {name: Tally() for name in _ADVICE}
        self._cut = {"chosen": Tally(), "rejected": Tally()}
        self._seen: set[bytes] = set()
        self._first: list[int] = []  # positions of the rows that repeat no earlier one
        # prompt -> (chosen, rejected, position): hashes stand for texts
        self._by_prompt: dict[bytes, list[tuple[bytes, bytes, int]]] = defaultdict(list)
        self._labels: dict[bytes, list[tuple[bool, int]]] = defaultdict(list)  # of unpaired rows
        self._position = 0
        self.similarity: dict[int, float] = {}

    def add(self, row: Row) -> None:
        texts = texts_of(row)
        prompt, chosen, rejected = map(digest, texts)
        key = prompt + chosen + rejected
        if key in self._seen:
            self._note("duplicates", row, _short(texts[0]))
        else:
            self._seen.add(key)
            self._first.append(self._position)
            if row.label is None:
                self._by_prompt[prompt].append((chosen, rejected, self._position))
            else:
                own = chosen if row.label else rejected
                self._labels[prompt + own].append((row.label, self._position))
        self._position += 1
        self._look_at_responses(row, texts)
        self._look_at_borders(row, texts)

    def _note(self, name: str, row: Row, example: str) -> None:
        self._tallies[name].add(row.index, example)

    def _look_at_responses(self, row: Row, texts: Texts) -> None:
        prompt, *both = texts
        responses = both if row.label is None else [text for text in both if text]
        bare = [
            text for text in responses if len(text.split(None, 1)) < 2 or not _WORD.search(text)
        ]
        if bare:
            self._note("one_word", row, _short(bare[0]))
        repeating = repeating_prompt(row)
        if repeating:
            self._note("repeats_prompt", row, _short(repeating[0]))
        marked = [found for text in responses if (found := _ROLE_MARK.search(text))]
        if not isinstance(row.prompt, str):  # a text prompt is formatted by whoever wrote it
            marked += [found for found in [_CONTROL_MARK.search(prompt)] if found]
        if marked:
            around = marked[0].string[max(0, marked[0].start() - 20) : marked[0].end() + 20]
            self._note("role_marks", row, around)
        alike = similarity(*both) if row.label is None else None
        if alike is not None:
            self.similarity[row.index] = alike
            self._note("almost_equal", row, f"{_short(responses[0])} | {_short(responses[1])}")

    def _look_at_borders(self, row: Row, texts: Texts) -> None:
        prompt, chosen, rejected = texts
        if isinstance(row.prompt, str) and prompt[-1:] in (" ", "\t"):
            self._note("prompt_ends_in_space", row, repr(prompt[-20:]))
        if row.label is not None:
            return
        if chosen[:1].isspace() != rejected[:1].isspace():
            self._note("one_side_begins_blank", row, f"{chosen[:20]!r} | {rejected[:20]!r}")
        cut = [_seems_cut(chosen), _seems_cut(rejected)]
        if cut[0] != cut[1]:
            side, text = ("chosen", chosen) if cut[0] else ("rejected", rejected)
            self._cut[side].add(row.index, "... " + text.rstrip()[-_EXAMPLE:])

    def near_duplicates(self, rows: Sequence[Row]) -> list[list[int]]:
        """Groups of row numbers; exact duplicates stand for their first row."""
        found = near_duplicate_groups(
            len(self._first), lambda place: texts_of(rows[self._first[place]])
        )
        groups = [[rows[self._first[place]].index for place in group] for group in found]
        later = sorted(number for group in groups for number in group[1:])
        for number in later:
            self._tallies["near_duplicates"].add(number)
        if groups:
            named = ", ".join(map(str, groups[0][:4])) + ", ..." * (len(groups[0]) > 4)
            self._tallies["near_duplicates"].example = f"rows {named} are one group"
        return groups

    def labels(self, rows: Sequence[Row]) -> None:
        """Contradictions among the labels of each prompt."""
        found: dict[str, set[int]] = defaultdict(set)
        for pairs in self._by_prompt.values():
            if len(pairs) < 2:
                continue
            edges = {(chosen, rejected) for chosen, rejected, _ in pairs}
            swapped = {edge for edge in edges if edge[::-1] in edges}
            circle = _circle(edges - swapped)
            both = {edge[0] for edge in edges} & {edge[1] for edge in edges}
            for chosen, rejected, position in pairs:
                edge = (chosen, rejected)
                if edge in swapped:
                    found["contradicting_labels"].add(position)
                elif edge in circle:
                    found["preference_cycles"].add(position)
                elif both & set(edge):
                    found["chosen_and_rejected"].add(position)
        for labels in self._labels.values():
            if len({label for label, _ in labels}) == 2:
                found["both_labels"] |= {position for _, position in labels}
        for name, positions in found.items():
            for position in sorted(positions):
                _, *sides = (_short(text) for text in texts_of(rows[position]))
                self._note(name, rows[position], " over ".join(filter(None, sides)))

    def findings(self) -> list[TextFinding]:
        """What is worth a word."""
        if self._tallies["one_word"].count > _RARE * self._total:
            self._tallies["one_word"] = Tally()
        self._tallies["one_side_cut_off"], more = self._cut_off()
        findings = []
        for name, (what, advice) in _ADVICE.items():
            tally = self._tallies[name]
            if tally.count:
                text = f"{tally.count} {'row' if tally.count == 1 else 'rows'}: {what}"
                text += more if name == "one_side_cut_off" else ""
                level: Literal["warning", "note"] = "note" if name in _NOTES else "warning"
                findings.append(TextFinding(name, text, advice, level, tally=tally))
        return findings

    def _cut_off(self) -> tuple[Tally, str]:
        """The side that lacks its end mark more often than by chance, and how often."""
        name, side = max(self._cut.items(), key=lambda item: item[1].count)
        counts = {name: tally.count for name, tally in self._cut.items()}
        difference, both = abs(counts["chosen"] - counts["rejected"]), sum(counts.values())
        if difference < max(_SIGMAS * both**0.5, _MIN_ONE_SIDED * self._total):
            return Tally(), ""
        other = "rejected" if name == "chosen" else "chosen"
        return side, f": the {name} one (the {other} one: {counts[other]})"


def _circle(edges: set[tuple[bytes, bytes]]) -> set[tuple[bytes, bytes]]:
    """The edges of one circle among these, if there is one."""
    if len(edges) < 3:
        return set()
    graph: dict[bytes, list[bytes]] = defaultdict(list)
    for chosen, rejected in sorted(edges):
        graph[rejected].append(chosen)  # graphlib wants predecessors
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        nodes = error.args[1]
        return set(pairwise(nodes))
    return set()


def _seems_cut(text: str) -> bool:
    last = text.rstrip()[-1:]
    return last.isalpha() or last in (",", "-", "–", "(", ";")


def _short(text: str) -> str:
    return shortened(text, _EXAMPLE)
