"""The pairs that look wrong, by three stated rules, with the numbers that say so.

A rule finds candidates, it proves nothing: a model that is wrong about a question disagrees with
the right label too. What stands first deserves a look first.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rmipo_lite.data.rows import Row, texts_of
from rmipo_lite.inspection.near_duplicates import ALMOST_EQUAL

Kind = Literal["label", "generic", "almost_equal"]
GENERIC_PMI = 0.1  # nats per token up to which a response doesn't depend on its prompt

RULES: dict[Kind, str] = {
    "label": "the model prefers the rejected one, and not for being a common text: log-prob gap "
    "and PMI gap (chosen - rejected) are both below 0; the surest first, by their sum",
    "generic": "a generic response wins: the chosen one's PMI is at most "
    f"{GENERIC_PMI} nats per token and below the rejected one's; lowest PMI gap first",
    "almost_equal": "chosen and rejected are almost the same: at least "
    f"{ALMOST_EQUAL:.0%} of their words, in order; most alike first",
}


@dataclass(frozen=True)
class SuspiciousPair:
    """A pair that deserves a look.

    Attributes:
        kind: which rule found it (`RULES`).
        row: its 0-based number in the dataset.
        prompt, chosen, rejected: its texts; messages joined by newlines.
        numbers: what the rule measured; logps, PMI and gaps in nats per token.
        why: the same in words.
    """

    kind: Kind
    row: int
    prompt: str
    chosen: str
    rejected: str
    numbers: dict[str, float]
    why: str


def candidates(
    rows: Sequence[Row], columns: Mapping[str, NDArray[Any]], similarity: Mapping[int, float]
) -> dict[Kind, list[int]]:
    """Places in `rows` that each rule finds, the most suspicious first.

    Args:
        rows: the dataset.
        columns: of `PairScores`, NaN where a pair has no number; empty without a model.
        similarity: of the rows whose responses are almost equal.
    """
    found: dict[Kind, list[int]] = {"label": [], "generic": [], "almost_equal": []}
    if columns:
        margin = columns["chosen_logps"] - columns["rejected_logps"]
        gap = columns["chosen_pmi"] - columns["rejected_pmi"]  # NaN where one is undefined
        with np.errstate(invalid="ignore"):
            against = (margin < 0) & (gap < 0)
            generic = (columns["chosen_pmi"] <= GENERIC_PMI) & (gap < 0)
        found["label"] = _ordered(against, margin + gap)
        found["generic"] = _ordered(generic, gap)
    place_of = {row.index: place for place, row in enumerate(rows)}
    alike = sorted(similarity.items(), key=lambda item: (-item[1], item[0]))
    found["almost_equal"] = [place_of[row] for row, _ in alike]
    return found


def _ordered(mask: NDArray[np.bool_], values: NDArray[Any]) -> list[int]:
    places = np.flatnonzero(mask)
    order: list[int] = places[np.argsort(values[places], kind="stable")].tolist()
    return order


def pairs_of(
    kind: Kind,
    places: Sequence[int],
    rows: Sequence[Row],
    columns: Mapping[str, NDArray[Any]],
    similarity: Mapping[int, float],
) -> Iterator[SuspiciousPair]:
    """The pairs at these places with texts, numbers and reason."""
    for place in places:
        row = rows[place]
        numbers = {
            name: float(columns[name][place])
            for name in ("chosen_logps", "rejected_logps", "chosen_pmi", "rejected_pmi")
            if kind != "almost_equal"
        }
        if kind == "almost_equal":
            numbers["similarity"] = similarity[row.index]
        yield SuspiciousPair(kind, row.index, *texts_of(row), numbers, _why(kind, numbers))


def _why(kind: Kind, numbers: dict[str, float]) -> str:
    if kind == "almost_equal":
        share = numbers["similarity"]
        return (
            "they differ in whitespace alone" if share == 1 else f"{share:.1%} of the words agree"
        )
    chosen, rejected = numbers["chosen_logps"], numbers["rejected_logps"]
    pmi = f"PMI {numbers['chosen_pmi']:.2f} against {numbers['rejected_pmi']:.2f}"
    if kind == "label":
        return (
            f"the model prefers the rejected one: logps {chosen:.2f} against {rejected:.2f}, {pmi}"
        )
    return f"the chosen one hardly depends on the prompt: {pmi}"
