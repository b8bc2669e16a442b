"""`TokenizedPair`: one preference pair as ids, what every later room works on."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TokenizedPair:
    """One pair as ids. The responses are the scored tokens."""

    row: int  # Row.index
    prompt_ids: list[int]  # with BOS if the tokenizer uses one; shared by both sides
    chosen_ids: list[int]  # with the end token unless truncated
    rejected_ids: list[int]
    rejected_prompt_ids: list[int] | None = None  # only where it differs (mode "authors")
