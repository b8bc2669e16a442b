"""What is wrong with preference pairs as tokens: control text, borders, cuts, lengths."""

from collections.abc import Sequence
from itertools import chain
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from rmipo_lite.data.length_balance import WEIGHED, fit_length_balance
from rmipo_lite.data.report import LENGTH_BIAS_SHARE, Tally, shortened
from rmipo_lite.data.rows import Row
from rmipo_lite.inspection.text_checks import TextFinding
from rmipo_lite.tokens.encoder import TextEncoder
from rmipo_lite.tokens.one_row import Outcome
from rmipo_lite.tokens.options import TokenizationOptions

_BORDER = 48  # characters on each side of the border that are encoded for the comparison
_MANY_CUT = 0.05  # share of the pairs from which cutting is a warning
_SIGMAS = 3.0  # of a fair coin, from which a length bias is more than chance

_Level = Literal["warning", "note"]
_ADVICE: dict[str, tuple[str, str, _Level]] = {
    "special_tokens": (
        "a text holds the text of a control token, which becomes that token",
        "Remove it, unless the data was meant to be written with the tokenizer's marks",
        "warning",
    ),
    "unknown_tokens": (
        "a text holds what the tokenizer doesn't know",
        "Look whether language and characters are the model's: unknown tokens teach nothing",
        "warning",
    ),
    "template_rewritten": (
        "the chat template changes an answer",
        "Look at its rules (some cut out thinking): what is trained isn't what stands in the data",
        "warning",
    ),
    "template_stripped": (
        "the chat template takes outer whitespace off an answer",
        "Nothing to do, unless the whitespace matters",
        "note",
    ),
    "border_merges": (
        "prompt and response would share a token if they were tokenised together",
        "End prompts with a newline, or begin responses with a blank: elsewhere they are often "
        "tokenised together",
        "note",
    ),
    "cut_on_one_side": (
        "one response alone is cut at the length limit",
        "Raise max_length or drop them: only one of the two answers has an end",
        "warning",
    ),
}


class TokenChecks:
    """Gathers what is wrong as the rows are tokenised, chunk by chunk."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: TokenizationOptions) -> None:
        self._encoder = TextEncoder(tokenizer)
        self._options = options
        self._tallies = {name: Tally() for name in _ADVICE}
        self._cut = Tally()
        self._pairs = 0
        unknown = tokenizer.unk_token_id
        # gpt2's unknown token is its end token, which every response has.
        ends = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id)
        self._unknown = None if unknown in ends else unknown

    def add(self, rows: Sequence[Row], outcomes: Sequence[Outcome]) -> None:
        """Look at one chunk; the outcomes are those of the rows, in order."""
        merging = self._merging(rows)
        for row, outcome in zip(rows, outcomes, strict=True):
            if outcome.special_text:
                self._tallies["special_tokens"].add(row.index)
            pair = outcome.pair
            if pair is None:
                continue
            self._pairs += 1
            sides = zip((pair.chosen_ids, pair.rejected_ids), pair.own_sides, strict=True)
            ids = chain(pair.prompt_ids, *(side for side, is_own in sides if is_own))
            for name, holds in (
                ("unknown_tokens", self._unknown is not None and self._unknown in ids),
                ("template_rewritten", outcome.rewritten > 0),
                ("template_stripped", outcome.stripped > 0),
                ("cut_on_one_side", outcome.responses_cut == 1 and pair.label is None),
            ):
                if holds:
                    self._tallies[name].add(row.index)
            if row.index in merging:
                self._tallies["border_merges"].add(row.index, merging[row.index])
            if outcome.prompt_cut or outcome.responses_cut:
                self._cut.add(row.index)

    def _merging(self, rows: Sequence[Row]) -> dict[int, str]:
        """Text rows whose border a joint tokenisation would not keep, with an example.

        The border of message rows is the template's, the same in every row and in generation.
        """
        sides = [
            (row.index, row.prompt[-_BORDER:], response[:_BORDER])
            for row in rows
            if isinstance(row.prompt, str) and row.prompt and self._options.mode == "separate"
            for response in row.responses.values()
            if isinstance(response, str)
        ]
        if not sides:
            return {}
        prompts = self._encoder.encode([prompt for _, prompt, _ in sides])
        responses = self._encoder.responses([response for _, _, response in sides])
        joint = self._encoder.encode([prompt + response for _, prompt, response in sides])
        return {
            row: shortened(f"{prompt[-12:]!r} + {response[:12]!r}")
            for (row, prompt, response), one, other, both in zip(
                sides, prompts, responses, joint, strict=True
            )
            if one + other != both
        }

    def findings(self) -> list[TextFinding]:
        """What is worth a word."""
        found = [
            TextFinding(name, f"{_rows(tally.count)}: {what}", advice, level, tally=tally)
            for name, (what, advice, level) in _ADVICE.items()
            if (tally := self._tallies[name]).count
        ]
        if self._cut.count:
            share = self._cut.count / self._pairs
            found.append(
                TextFinding(
                    "truncated",
                    f"{_rows(self._cut.count)}: cut at {self._options.max_length} tokens "
                    f"({share:.1%} of the pairs)",
                    "Raise max_length if memory allows, or drop the longest pairs",
                    "warning" if share > _MANY_CUT else "note",
                    tally=self._cut,
                )
            )
        return found


def _rows(count: int) -> str:
    return f"{count} row" if count == 1 else f"{count} rows"


def length_bias(
    chosen: NDArray[Any], rejected: NDArray[Any], unit: str
) -> tuple[list[tuple[str, str]], TextFinding | None]:
    """How far length alone tells chosen from rejected.

    Args:
        chosen, rejected: lengths of the pairs, at least one pair.
        unit: what they are counted in.

    Returns:
        (label, value) facts, and a finding where the longer or the shorter response wins in more
        than 60 % of the pairs of different length.
    """
    longer, shorter = int((chosen > rejected).sum()), int((chosen < rejected).sum())
    ratio = float(np.median(chosen / np.maximum(rejected, 1)))
    share = f"{longer / len(chosen):.1%} of the pairs, shorter in {shorter / len(chosen):.1%}"
    facts = [("chosen longer", f"{share}; median ratio of lengths {ratio:.2f} ({unit})")]
    differing = longer + shorter
    if not differing:
        return facts, None
    facts.append(("the longer wins", f"{longer / differing:.1%} of the pairs of different length"))
    balance = fit_length_balance(np.maximum(chosen, 1).tolist(), np.maximum(rejected, 1).tolist())
    if balance is not None:
        facts.append(("length balance", str(balance) if unit == "tokens" else balance.of_lengths))
    word = "longer" if longer >= shorter else "shorter"
    wins = max(longer, shorter) / differing
    if wins <= LENGTH_BIAS_SHARE or abs(longer - shorter) < _SIGMAS * differing**0.5:
        return facts, None
    learnt = {
        "longer": "long answers, or answers that never end",
        "shorter": "answers that are too short",
    }
    return facts, TextFinding(
        "length_bias",
        f"the {word} response is the chosen one in {wins:.0%} of the pairs of different length",
        f"Watch the length of the answers: training can learn to write {learnt[word]}"
        + (f"; {WEIGHED}" if balance is not None and balance.is_used else ""),
    )
