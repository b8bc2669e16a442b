"""The tokenisation of the RMiPO authors' code (trl 0.10's), for exact comparison with it.

Prompt and answer are encoded together and the prompt's ids are cut off, one earlier if the last
prompt token merged with the answer. So the two sides can have different prompts. BOS goes in front
unless it is there, EOS behind unless it is there. Truncation looks at prompt plus the longer
answer: too long, and the prompt is cut to `max_prompt_length`; still too long, and both answers
are cut to `max_length - max_prompt_length`, however short the other side is.
Checked against recorded outputs of that code.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Encode = Callable[[str], list[int]]  # text -> ids without special tokens


@dataclass(frozen=True, slots=True)
class AuthorsPair:
    """Ids of one pair; the answers are what is scored."""

    chosen_prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_prompt_ids: list[int]
    rejected_ids: list[int]
    truncated: bool
    untruncated: tuple[int, int, int]  # lengths of prompt, chosen and rejected before truncation


@dataclass(frozen=True, slots=True)
class AuthorsRules:
    """The settings that their row function reads."""

    bos_id: int | None
    eos_id: int
    max_length: int
    max_prompt_length: int
    truncation_mode: Literal["keep_end", "keep_start"]


def encode_pair(
    prompt: str, chosen: str, rejected: str, encode: Encode, rules: AuthorsRules
) -> AuthorsPair:
    """One pair's ids.

    Raises:
        ValueError: the encodings can't be brought together; their code fails with the same words.
    """
    alone = encode(prompt)
    sides = [_split(alone, encode(prompt + answer)) for answer in (chosen, rejected)]
    _check_prompts(sides[0][0], sides[1][0])
    marked = [(_with_bos(ids, rules), _with_eos(answer, rules)) for ids, answer in sides]
    longer = max(len(answer) for _, answer in marked)
    cut = [_truncate(ids, answer, longer, rules) for ids, answer in marked]
    return AuthorsPair(
        *cut[0],
        *cut[1],
        truncated=cut != marked,
        untruncated=(len(marked[0][0]), len(marked[0][1]), len(marked[1][1])),
    )


def _split(alone: list[int], joint: list[int]) -> tuple[list[int], list[int]]:
    """Prompt and answer of a joint encoding; the border moves one back if the tokens merged."""
    if len(joint) < len(alone):
        raise ValueError("Prompt input ids and answer input ids should have the same length.")
    border = len(alone) if joint[: len(alone)] == alone else len(alone) - 1
    return joint[:border], joint[border:]


def _check_prompts(chosen: list[int], rejected: list[int]) -> None:
    differing = sum(a != b for a, b in zip(chosen, rejected, strict=False))
    if differing > 1 or abs(len(chosen) - len(rejected)) > 1:
        raise ValueError(
            "Chosen and rejected prompt_input_ids might only differ on the last token due to "
            "tokenizer merge ops."
        )


def _with_bos(ids: list[int], rules: AuthorsRules) -> list[int]:
    if rules.bos_id is None or ids[:1] == [rules.bos_id]:
        return ids
    return [rules.bos_id, *ids]


def _with_eos(ids: list[int], rules: AuthorsRules) -> list[int]:
    return ids if ids[-1:] == [rules.eos_id] else [*ids, rules.eos_id]


def _truncate(
    prompt: list[int], answer: list[int], longer: int, rules: AuthorsRules
) -> tuple[list[int], list[int]]:
    if len(prompt) + longer > rules.max_length:
        limit = rules.max_prompt_length
        # A limit of 0 from the end keeps everything, as ids[-0:] does in their code.
        prompt = prompt[:limit] if rules.truncation_mode == "keep_start" else prompt[-limit:]
    if len(prompt) + longer > rules.max_length:
        answer = answer[: rules.max_length - rules.max_prompt_length]
    return prompt, answer
