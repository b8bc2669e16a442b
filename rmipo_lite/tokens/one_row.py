"""Rows -> ids, row by row: encode, join at the border, truncate, judge.

Prompt and response are tokenised apart and their ids joined, so that both sides have one prompt,
whatever the tokenizer would merge across the border. Text rows stay text even when the tokenizer
has a chat template (trl's rule); message rows go through the template.

Truncation: the prompt and the responses share `max_length`. The prompt is cut from the left
(keeping BOS) until the longer response fits, but not below half of `max_length`; then each
response keeps its first tokens within what is left. So a response of up to half of `max_length`
is never cut, whatever the other side, and nothing is cut that would fit. A cut response has no end
token. Of an unpaired row the mismatched completion has no say: it takes the room that is left.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from rmipo_lite.data.columns import COLUMNS
from rmipo_lite.data.normalise import Dropped, Identical, Refused
from rmipo_lite.data.rows import Row
from rmipo_lite.tokens.authors import AuthorsRules, encode_pair
from rmipo_lite.tokens.encoder import CHARS_PER_TOKEN, TextEncoder
from rmipo_lite.tokens.options import TokenizationOptions
from rmipo_lite.tokens.pair import TokenizedPair
from rmipo_lite.tokens.templates import Rendered, render, render_rows, text_of


@dataclass(frozen=True, slots=True)
class Outcome:
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


def tokenize(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, options: TokenizationOptions
) -> list[Outcome]:
    """Outcomes in order. A pure function of its arguments, so that processes can share the work."""
    encoder = TextEncoder(tokenizer)
    if options.mode == "authors":
        return [
            text if isinstance(text, Outcome) else _authors_outcome(row, text, encoder, options)
            for row, text in zip(rows, _authors_texts(rows, tokenizer), strict=True)
        ]
    chats = [row for row in rows if not isinstance(row.prompt, str)]
    rendered = iter(render_rows(chats, tokenizer) if chats else [])
    texts = [_plain(row) if isinstance(row.prompt, str) else next(rendered) for row in rows]
    good = [
        (row, text) for row, text in zip(rows, texts, strict=True) if isinstance(text, Rendered)
    ]
    done = iter(_encode(good, encoder, options))
    return [
        next(done) if isinstance(text, Rendered) else _verdict(row, text)
        for row, text in zip(rows, texts, strict=True)
    ]


def _plain(row: Row) -> Rendered:
    assert isinstance(row.prompt, str)
    assert isinstance(row.chosen, str)
    assert isinstance(row.rejected, str)
    return Rendered(row.prompt, row.chosen, row.rejected, after="")


def _verdict(row: Row, problem: Refused | Dropped) -> Outcome:
    if isinstance(problem, Refused):
        return Outcome(row.index, refused=problem.reason, example=problem.example)
    return Outcome(
        row.index,
        dropped=problem.reason,
        example=problem.example,
        identical=isinstance(problem, Identical),
    )


def _encode(
    good: Sequence[tuple[Row, Rendered]], encoder: TextEncoder, options: TokenizationOptions
) -> list[Outcome]:
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
) -> Outcome:
    """Truncate and judge one pair, or one unpaired row by its own completion."""
    own = [responses[name == "rejected"] for name in row.responses]
    for name, response in zip(row.responses, own, strict=True):
        if encoder.special_ids.issuperset(response.ids):
            return _verdict(row, Dropped(name, "a response", "control or unknown tokens alone"))
    lengths = (len(prompt), len(responses[0].ids), len(responses[1].ids))
    longest = max(len(response.ids) for response in own)
    room = prompt_room((len(prompt), longest, longest), options)
    short_prompt = _cut_left(prompt, room, encoder.front(prompt))
    budget = None if options.max_length is None else options.max_length - len(short_prompt)
    chosen, rejected = (response.ids[:budget] for response in responses)
    if not short_prompt and min(len(chosen), len(rejected)) < 2:
        # Without any context the first token can't be scored, and there is no other.
        wanted = "a token (or a BOS) before a response of one token"
        return _verdict(row, Dropped("prompt", wanted, "none"))
    if chosen == rejected and row.label is None:
        whole = room >= len(prompt) and chosen == responses[0].ids
        return _verdict(row, Identical(" as tokens" if whole else " after truncation"))
    cut = [
        any(response is one for one in own) and (response.cut or len(ids) < len(response.ids))
        for ids, response in zip((chosen, rejected), responses, strict=True)
    ]
    return Outcome(
        row.index,
        TokenizedPair(row.index, short_prompt, chosen, rejected, label=row.label),
        lengths=lengths,
        prompt_cut=len(short_prompt) < len(prompt),
        responses_cut=sum(cut),
    )


def prompt_room(lengths: tuple[int, int, int], options: TokenizationOptions) -> int:
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
        for side in (row.prompt, *row.responses.values())
        for text in ([side] if isinstance(side, str) else [m["content"] for m in side])
    )


def _authors_outcome(
    row: Row, texts: tuple[str, str, str], encoder: TextEncoder, options: TokenizationOptions
) -> Outcome:
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
        pair = encode_pair(*texts, encode, rules)
    except ValueError as error:
        wanted = "encodings that share a prompt, for tokenization='authors'"
        return _verdict(row, Refused("prompt, chosen, rejected", wanted, "others", str(error)))
    for name, ids in (("chosen", pair.chosen_ids), ("rejected", pair.rejected_ids)):
        if not ids:
            return _verdict(row, Dropped(name, "a token left after truncation", "none"))
    same = pair.rejected_prompt_ids == pair.chosen_prompt_ids
    return Outcome(
        row.index,
        TokenizedPair(
            row.index,
            pair.chosen_prompt_ids,
            pair.chosen_ids,
            pair.rejected_ids,
            None if same else pair.rejected_prompt_ids,
            label=row.label,
        ),
        lengths=pair.untruncated,
        prompt_cut=len(pair.chosen_prompt_ids) < pair.untruncated[0],
        responses_cut=(len(pair.chosen_ids) < pair.untruncated[1])
        + (len(pair.rejected_ids) < pair.untruncated[2]),
        special_text=_has_special_text(row, encoder),
    )


def _authors_texts(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, str, str] | Outcome]:
    """The three texts of every row, or why it has none.

    Their code renders prompt and answer apart, the header with the answer.
    """
    sides = [(row.prompt, row.chosen, row.rejected) for row in rows]
    messages = [side for three in sides for side in three if not isinstance(side, str)]
    rendered = iter(render(messages, tokenizer))
    bos = tokenizer.bos_token or ""
    outcomes: list[tuple[str, str, str] | Outcome] = []
    for row, three in zip(rows, sides, strict=True):
        # All three before the first is judged: a refused prompt must not leave its answers behind.
        found = [side if isinstance(side, str) else next(rendered) for side in three]
        try:
            prompt, chosen, rejected = (
                side if isinstance(side, str) else text_of(text, name, side)
                for name, side, text in zip(COLUMNS, three, found, strict=True)
            )
        except Refused as problem:
            outcomes.append(_verdict(row, problem))
            continue
        if not isinstance(row.prompt, str):
            chosen, rejected = chosen.removeprefix(bos), rejected.removeprefix(bos)
        outcomes.append((prompt, chosen, rejected))
    return outcomes
