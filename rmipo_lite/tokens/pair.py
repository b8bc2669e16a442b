"""`TokenizedPair`: one preference pair as ids, what every later room works on."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class TokenizedPair:
    """One pair as ids. The responses are the scored tokens.

    With a label it is an unpaired row: one side is the row's own completion, chosen where the label
    is true, and the other a mismatched one, which `kto` takes its KL from.
    """

    row: int  # Row.index
    prompt_ids: list[int]  # with BOS if the tokenizer uses one; shared by both sides
    chosen_ids: list[int]  # with the end token unless truncated
    rejected_ids: list[int]
    rejected_prompt_ids: list[int] | None = None  # only where it differs (mode "authors")
    label: bool | None = field(default=None, kw_only=True)

    @property
    def own_sides(self) -> tuple[bool, bool]:
        """Whether chosen and rejected are the row's own."""
        return self.label is not False, self.label is not True
