"""Unpaired rows: a prompt, one completion and a label that says whether it is desirable.

A row's own completion stands on the side that its label names, chosen where it is true. On the
other side stands a mismatched completion, from which `kto` takes its KL: that of the nearest row
before it (the first row's is before it in the last) that has another prompt. trl takes the row
before it in the batch, which of unpaired pairs often has the same prompt.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rmipo_lite.data.normalise import (
    Dropped,
    Message,
    Refused,
    Side,
    kind_of,
    normalise,
    text_of_side,
)

# As text, since CSV has no other cells; pandas makes 1.0 of 1 in a column with gaps.
_LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
_HEAVIER = 4 / 3
LEAST_ROWS = 2  # one row has no other to be mismatched with


@dataclass(frozen=True)
class Half:
    """One side of a pair, as a row of its own."""

    record: Any
    is_chosen: bool


def halves(records: Sequence[Any]) -> list[Half]:
    """Two rows of each pair, the chosen side first."""
    return [Half(record, chosen) for record in records for chosen in (True, False)]


def whole_of(record: Any) -> Any:
    """The record as it came, of half a pair too."""
    return record.record if isinstance(record, Half) else record


def normalise_unpaired(record: Any, as_messages: bool) -> tuple[Side, Side, bool]:
    """(prompt, completion, label) of a record {prompt, completion, label} or of half a pair.

    Raises:
        Refused, Dropped: as `normalise`; a label that is neither true nor false.
    """
    if isinstance(record, Half):
        prompt, chosen, rejected = normalise(record.record, as_messages)
        return prompt, chosen if record.is_chosen else rejected, record.is_chosen
    if not isinstance(record, Mapping):
        raise Refused("row", "a dict with prompt, completion and label", kind_of(record))
    label = _label(record)
    try:
        prompt, completion, _ = normalise(record, as_messages, ("completion", "completion"))
    except (Refused, Dropped) as problem:
        raise type(problem)(
            _renamed(problem.columns), _renamed(problem.wanted), problem.got, problem.example
        ) from None
    return prompt, completion, label


def _renamed(text: str) -> str:
    """What is said of two sides, said of one."""
    for words in ("chosen and rejected", "chosen", "rejected"):
        text = text.replace(words, "completion")
    return text


def _label(record: Mapping[str, Any]) -> bool:
    label = record.get("label")
    text = str(label).strip().lower()
    if text not in _LABELS:
        got = repr(label)[:40] if isinstance(label, str | int) else kind_of(label)
        raise Refused("label", "true or false (1 or 0)", got)
    return _LABELS[text]


def weights_advice(labels: Sequence[bool], desirable: float, undesirable: float) -> str | None:
    """What to set where one label outweighs the other; None where they are even enough.

    The paper (arXiv 2402.01306, section 4.2) wants the desirable rows to weigh 1 to 4/3 times what
    the others do.
    """
    counts = sum(labels), len(labels) - sum(labels)
    if not all(counts):
        which = "desirable" if counts[0] else "undesirable"
        return f"every row is {which}: nothing tells these completions from the others"
    fit = undesirable * counts[1] / counts[0]
    if round(fit, 2) <= desirable <= round(_HEAVIER * fit, 2):
        return None
    return (
        f"{counts[0]} rows are desirable and {counts[1]} undesirable: desirable_weight from "
        f"{fit:.2f} to {_HEAVIER * fit:.2f} would even them out"
    )


def mismatched(prompts: Sequence[Side], completions: Sequence[Side]) -> list[Side]:
    """Of every row another row's completion, in the form of its own.

    With one prompt alone it is the row before it.
    """
    count = len(prompts)
    other: list[int | None] = [None] * count  # the nearest row before it with another prompt
    for place in itertools.chain(range(count), range(count)):  # the second time from the last on
        before = (place - 1) % count
        other[place] = before if prompts[before] != prompts[place] else other[before]
    found = []
    for place, own in enumerate(completions):
        taken = other[place]
        text = completions[(place - 1) % count if taken is None else taken]
        found.append(_in_form_of(own, text))
    return found


def _in_form_of(own: Side, side: Side) -> Side:
    if isinstance(own, str):
        return text_of_side(side)
    message: Message = {"role": "assistant", "content": text_of_side(side)}
    return [message]
