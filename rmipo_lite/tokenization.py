"""Rows -> token pairs: the border, BOS, the end token, truncation; every row accounted for.

Prompt and response are tokenised apart and their ids joined, so that both sides have one prompt,
whatever the tokenizer would merge across the border. Text rows stay text even when the tokenizer
has a chat template (trl's rule); message rows go through the template.

Truncation: the prompt and the responses share `max_length`. The prompt is cut from the left
(keeping BOS) until the longer response fits, but not below half of `max_length`; then each
response keeps its first tokens within what is left. So a response of up to half of `max_length`
is never cut, whatever the other side, and nothing is cut that would fit. A cut response has no end
token.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from rmipo_lite.authors_tokenization import AuthorsRules, encode_pair
from rmipo_lite.chat_templates import (
    Rendered,
    prepare_tokenizer,
    render_prompt,
    render_rows,
    require_template,
)
from rmipo_lite.data import DataReport, Row, nothing_left
from rmipo_lite.data_rows import Dropped, Message, Refused
from rmipo_lite.text_encoder import CHARS_PER_TOKEN, TextEncoder

__all__ = [
    "TokenizationOptions",
    "TokenizedPair",
    "encode_prompt",
    "prepare_tokenizer",
    "tokenize_rows",
]

MIN_ROWS_PER_PROCESS = 500  # below, starting a process costs more than it saves


@dataclass(frozen=True, slots=True)
class TokenizedPair:
    """One pair as ids. The responses are the scored tokens."""

    row: int  # Row.index
    prompt_ids: list[int]  # with BOS if the tokenizer uses one; shared by both sides
    chosen_ids: list[int]  # with the end token unless truncated
    rejected_ids: list[int]
    rejected_prompt_ids: list[int] | None = None  # only where it differs (mode "authors")


@dataclass(frozen=True)
class TokenizationOptions:
    """How rows become ids; lengths in tokens."""

    mode: Literal["separate", "authors"] = "separate"
    max_length: int | None = 1024  # prompt + response; None: no limit
    max_prompt_length: int | None = None  # None: no limit of its own
    truncation_mode: Literal["keep_end", "keep_start"] = "keep_end"  # mode "authors" only
    chat_template: str | None = None  # as for `prepare_tokenizer`
    num_proc: int | None = None  # processes; None: this one


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What became of one row; sent from worker processes, hence plain data."""

    row: int
    pair: TokenizedPair | None = None
    refused: str = ""
    dropped: str = ""
    example: str = ""
    identical: bool = False
    lengths: tuple[int, int, int] = (0, 0, 0)  # prompt, chosen, rejected before truncation
    prompt_cut: bool = False
    responses_cut: int = 0
    special_text: bool = False
    stripped: int = 0
    rewritten: int = 0


def tokenize_rows(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    options: TokenizationOptions,
    report: DataReport,
) -> list[TokenizedPair]:
    """Token pairs of all rows that have one, in order; the others are counted in `report`.

    Raises:
        ValueError: no EOS token, no chat template for message rows, a template that takes for
            ever, options that contradict each other, or not one pair left.
    """
    tokenizer = prepare_tokenizer(tokenizer, options.chat_template)
    _check(rows, tokenizer, options)
    outcomes = _in_processes(rows, tokenizer, options)
    if outcomes is None:
        outcomes = _tokenize(rows, tokenizer, options)
    pairs = _count(outcomes, report)
    if not pairs:
        raise ValueError(nothing_left(report))
    return pairs


def encode_prompt(prompt: str | list[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids in front of an answer, exactly as in training; for generation."""
    text = prompt if isinstance(prompt, str) else render_prompt(prompt, tokenizer)
    return TextEncoder(tokenizer).prompts([text])[0]


def _check(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, options: TokenizationOptions
) -> None:
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "tokenizer: it has no eos_token, so a model could not learn where an answer ends; "
            "set tokenizer.eos_token to the token that ends a text"
        )
    if options.max_length is not None and options.max_length < 2:
        raise ValueError(f"max_length: wanted at least 2 tokens, got {options.max_length}")
    if options.mode == "authors":
        if options.max_length is None or options.max_prompt_length is None:
            raise ValueError("tokenization='authors' needs max_length and max_prompt_length")
    elif options.mode != "separate":
        raise ValueError(f"tokenization: wanted 'separate' or 'authors', got {options.mode!r}")
    if any(not isinstance(row.prompt, str) for row in rows):
        require_template(tokenizer)


def _in_processes(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, options: TokenizationOptions
) -> list[_Outcome] | None:
    """Outcomes from worker processes; None where one process is asked for or is all there is."""
    count = min(options.num_proc or 1, len(rows) // MIN_ROWS_PER_PROCESS)
    if count < 2:
        return None
    size = -(-len(rows) // count)
    chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
    try:
        pickle.dumps(tokenizer)
        # Spawned, not forked: a fork after OpenMP or the tokenizer's own threads can hang.
        with ProcessPoolExecutor(len(chunks), mp_context=get_context("spawn")) as pool:
            jobs = [pool.submit(_tokenize, chunk, tokenizer, options) for chunk in chunks]
            return [outcome for job in jobs for outcome in job.result()]
    except (pickle.PicklingError, TypeError, AttributeError, BrokenProcessPool) as error:
        warnings.warn(
            f"dataset_num_proc={options.num_proc}: worker processes can't be used "
            f"({type(error).__name__}: {str(error)[:200]}); tokenising in this one",
            stacklevel=3,
        )
        return None


def _count(outcomes: Sequence[_Outcome], report: DataReport) -> list[TokenizedPair]:
    """Move every outcome into the report; the pairs that are left."""
    pairs: list[TokenizedPair] = []
    kept = [outcome for outcome in outcomes if outcome.pair is not None]
    for outcome in outcomes:
        report.special_token_rows += outcome.special_text
        report.identical_pairs += outcome.identical
        if outcome.pair is not None:
            pairs.append(outcome.pair)
            continue
        report.kept -= 1
        if outcome.refused:
            report.refuse(outcome.row, outcome.refused, outcome.example)
        else:
            report.drop(outcome.row, outcome.dropped, outcome.example)
    report.check()
    for outcome in kept:
        report.truncated_pairs += outcome.prompt_cut or outcome.responses_cut > 0
        report.truncated_prompts += outcome.prompt_cut
        report.truncated_responses += outcome.responses_cut
        report.chosen_longer_pairs += outcome.lengths[1] > outcome.lengths[2]
        report.template_stripped += outcome.stripped
        report.template_rewritten += outcome.rewritten
    columns = zip(*(outcome.lengths for outcome in kept), strict=True)
    report.set_lengths(**dict(zip(("prompt", "chosen", "rejected"), columns, strict=False)))
    return pairs


def _tokenize(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, options: TokenizationOptions
) -> list[_Outcome]:
    """Outcomes in order. A pure function of its arguments, so that processes can share the work."""
    encoder = TextEncoder(tokenizer)
    texts: list[Rendered | Refused | Dropped | None] = [None] * len(rows)
    chats = [number for number, row in enumerate(rows) if not isinstance(row.prompt, str)]
    if options.mode == "authors":
        return [_authors_outcome(row, encoder, options) for row in rows]
    if chats:
        rendered = render_rows([rows[number] for number in chats], tokenizer)
        for number, text in zip(chats, rendered, strict=True):
            texts[number] = text
    for number, row in enumerate(rows):
        if isinstance(row.prompt, str):
            assert isinstance(row.chosen, str)
            assert isinstance(row.rejected, str)
            texts[number] = Rendered(row.prompt, row.chosen, row.rejected, after="")
    good = [
        (row, text) for row, text in zip(rows, texts, strict=True) if isinstance(text, Rendered)
    ]
    done = iter(_encode(good, encoder, options))
    return [
        next(done) if isinstance(text, Rendered) else _verdict(row, text)
        for row, text in zip(rows, texts, strict=True)
    ]


def _verdict(row: Row, problem: Any) -> _Outcome:
    if isinstance(problem, Refused):
        return _Outcome(row.index, refused=problem.reason, example=problem.example)
    return _Outcome(row.index, dropped=problem.reason, identical=problem.identical)


def _encode(
    good: Sequence[tuple[Row, Rendered]], encoder: TextEncoder, options: TokenizationOptions
) -> list[_Outcome]:
    """Encode all texts in two batches, every distinct prompt once, and join them by row."""
    limit = None if options.max_length is None else options.max_length * CHARS_PER_TOKEN
    distinct = list(dict.fromkeys(text.prompt for _, text in good))
    heads = [text if limit is None else text[-limit:] for text in distinct]
    prompts = dict(zip(distinct, encoder.prompts(heads), strict=True))
    ends = {after: encoder.end_of_turn(after) for after in {text.after for _, text in good}}
    sides = [(side, text) for _, text in good for side in (text.chosen, text.rejected)]
    is_cut = [limit is not None and len(side) > limit for side, _ in sides]
    encoded = encoder.responses(
        [
            side[:limit] if cut else side + ends[text.after]
            for (side, text), cut in zip(sides, is_cut, strict=True)
        ]
    )
    outcomes = []
    for number, (row, text) in enumerate(good):
        responses = []
        for at in (2 * number, 2 * number + 1):
            ids = encoded[at]
            if not is_cut[at] and not ends[text.after]:
                ids = _with_eos(ids, encoder)
            responses.append(_Response(ids, is_cut[at]))
        outcome = _outcome(row, prompts[text.prompt], responses, encoder, options)
        prompt_cut = limit is not None and len(text.prompt) > limit
        outcomes.append(
            replace(
                outcome,
                special_text=_has_special_text(row, encoder),
                stripped=text.stripped,
                rewritten=text.rewritten,
                prompt_cut=outcome.prompt_cut or prompt_cut,
            )
        )
    return outcomes


def _with_eos(ids: list[int], encoder: TextEncoder) -> list[int]:
    eos_id = encoder.tokenizer.eos_token_id
    return ids if ids[-1:] == [eos_id] else [*ids, eos_id]


@dataclass(frozen=True, slots=True)
class _Response:
    ids: list[int]
    cut: bool  # it has lost its end already


def _outcome(
    row: Row,
    prompt: list[int],
    responses: list[_Response],
    encoder: TextEncoder,
    options: TokenizationOptions,
) -> _Outcome:
    """Truncate and judge one pair."""
    lengths = (len(prompt), len(responses[0].ids), len(responses[1].ids))
    for name, response in zip(("chosen", "rejected"), responses, strict=True):
        if encoder.special_ids.issuperset(response.ids):
            return _Outcome(row.index, dropped=f"empty {name} response: control tokens alone")
    room = _prompt_room(lengths, options)
    short_prompt = _cut_left(prompt, room, encoder.bos_ids)
    budget = None if options.max_length is None else options.max_length - len(short_prompt)
    chosen, rejected = (response.ids[:budget] for response in responses)
    if not short_prompt and min(len(chosen), len(rejected)) < 2:
        # Without any context the first token can't be scored, and there is no other.
        return _Outcome(row.index, dropped="no prompt token, no BOS and a response of one token")
    if chosen == rejected:
        reason = "chosen and rejected are identical "
        reason += (
            "as tokens"
            if room >= len(prompt) and chosen == responses[0].ids
            else "after truncation"
        )
        return _Outcome(row.index, dropped=reason, identical=True)
    cut = [
        response.cut or len(ids) < len(response.ids)
        for ids, response in zip((chosen, rejected), responses, strict=True)
    ]
    return _Outcome(
        row.index,
        TokenizedPair(row.index, short_prompt, chosen, rejected),
        lengths=lengths,
        prompt_cut=len(short_prompt) < len(prompt),
        responses_cut=sum(cut),
    )


def _prompt_room(lengths: tuple[int, int, int], options: TokenizationOptions) -> int:
    """How many tokens the prompt may keep; see the module's docstring."""
    prompt, chosen, rejected = lengths
    room = prompt
    if options.max_length is not None:
        room = min(room, max(options.max_length - max(chosen, rejected), options.max_length // 2))
    return room if options.max_prompt_length is None else min(room, options.max_prompt_length)


def _cut_left(prompt: list[int], room: int, bos_ids: list[int]) -> list[int]:
    if len(prompt) <= room:
        return prompt
    if bos_ids and prompt[: len(bos_ids)] == bos_ids and room > len(bos_ids):
        return bos_ids + prompt[len(prompt) - room + len(bos_ids) :]
    return prompt[len(prompt) - room :]


def _has_special_text(row: Row, encoder: TextEncoder) -> bool:
    return any(
        encoder.has_special_text(text)
        for side in (row.prompt, row.chosen, row.rejected)
        for text in ([side] if isinstance(side, str) else [m["content"] for m in side])
    )


def _authors_outcome(row: Row, encoder: TextEncoder, options: TokenizationOptions) -> _Outcome:
    """One row by the authors' rules; identical pairs stay, since they stay there too."""
    tokenizer = encoder.tokenizer
    assert options.max_length is not None
    assert options.max_prompt_length is not None
    rules = AuthorsRules(
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        options.max_length,
        options.max_prompt_length,
        options.truncation_mode,
    )
    encode: Callable[[str], list[int]] = lambda text: encoder.encode([text])[0]  # noqa: E731
    try:
        texts = _authors_texts(row, tokenizer)
        pair = encode_pair(*texts, encode, rules)
    except Refused as problem:
        return _verdict(row, problem)
    except ValueError as error:
        return _Outcome(row.index, refused="authors' tokenisation fails", example=str(error))
    if not pair.chosen_ids or not pair.rejected_ids:
        return _Outcome(row.index, dropped="no response token left after truncation")
    same = pair.rejected_prompt_ids == pair.chosen_prompt_ids
    return _Outcome(
        row.index,
        TokenizedPair(
            row.index,
            pair.chosen_prompt_ids,
            pair.chosen_ids,
            pair.rejected_ids,
            None if same else pair.rejected_prompt_ids,
        ),
        lengths=pair.untruncated,
        prompt_cut=len(pair.chosen_prompt_ids) < pair.untruncated[0],
        responses_cut=(len(pair.chosen_ids) < pair.untruncated[1])
        + (len(pair.rejected_ids) < pair.untruncated[2]),
        special_text=_has_special_text(row, encoder),
    )


def _authors_texts(row: Row, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, str]:
    """The three texts. Their code renders prompt and answer apart, the header with the answer."""
    if isinstance(row.prompt, str):
        assert isinstance(row.chosen, str)
        assert isinstance(row.rejected, str)
        return row.prompt, row.chosen, row.rejected
    texts = []
    for messages in (row.prompt, row.chosen, row.rejected):
        assert not isinstance(messages, str)
        try:
            text = str(tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception as error:  # a template raises what it likes
            raise Refused("the chat template refuses the conversation", str(error)) from error
        texts.append(text)
    bos = tokenizer.bos_token
    answers = [text.removeprefix(bos) if bos else text for text in texts[1:]]
    return texts[0], answers[0], answers[1]
