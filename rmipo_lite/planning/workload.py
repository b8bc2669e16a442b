"""The tokens of a dataset, as far as memory and time of a run depend on them."""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, cast

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from rmipo_lite.config import RMiPOConfig
from rmipo_lite.data.report import DataReport
from rmipo_lite.model import batch, loading
from rmipo_lite.tokens.one_row import prompt_room
from rmipo_lite.tokens.options import TokenizationOptions, options_for
from rmipo_lite.tokens.pair import TokenizedPair
from rmipo_lite.tokens.prepare import is_tokenized, prepare

_ASSUMED_PAIRS = 10_000
_ASSUMED = (200, 300, 274)
Lengths = tuple[int, int, int]


@dataclass(frozen=True)
class Workload:
    """Tokens of a dataset.

    Attributes:
        pairs: how many.
        longest: packed tokens of the longest pair, and `step` of an optimizer step of such.
        policy, prior, scored: tokens read with and without prompts, and scored, in one epoch.
        note: where the lengths come from.
        each: packed tokens of every pair.
        lengths: prompt, chosen and rejected of what a shorter `max_length` would cut; none where
            it would cut nothing, as of pairs that are tokenised already.
    """

    pairs: int
    longest: int
    step: int
    policy: int
    prior: int
    scored: int
    note: str
    each: tuple[int, ...]
    lengths: tuple[Lengths, ...] = ()


def workload(
    name: str,
    shape: PretrainedConfig,
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase | str | None,
    args: RMiPOConfig,
) -> Workload:
    """The workload of a dataset under a model; of pairs that are assumed where it is None.

    Args:
        name: of the model, whose tokenizer is loaded where none is given.
        shape: its config, which limits `max_length`.
        dataset: as for `train`, what `load_rows` gave for one, or `TokenizedPair`s.
        tokenizer: itself, its name or its folder.
        args: the options of the run.
    """
    if dataset is None:
        most = options_for(args, shape).max_length or 1024
        usual = cut_lengths(_ASSUMED, most, args)
        prompt = min(_ASSUMED[0], most // 2, args.max_prompt_length or most)
        longest = (prompt, most - prompt, most - prompt)
        texts = " + ".join(map(str, usual))
        note = f"assumed: {texts} tokens, the longest {prompt} + 2 x {longest[1]}"
        found = _counted([_pair(usual)], [_pair(longest)] * args.pairs_per_step, args, note)
        times = _ASSUMED_PAIRS
        return replace(
            found,
            pairs=times,
            policy=times * found.policy,
            prior=times * found.prior,
            scored=times * found.scored,
            each=times * found.each,
            lengths=(longest,) * args.pairs_per_step,
        )
    lengths: tuple[Lengths, ...] = ()
    if is_tokenized(dataset):
        pairs, kept = list(dataset), f"{len(dataset)} pairs"
    else:
        if tokenizer is None or isinstance(tokenizer, str):
            tokenizer = loading.load_tokenizer(tokenizer or name)
        ready = prepare(dataset, tokenizer, args, shape)
        pairs, report = ready.pairs, cast(DataReport, ready.report)
        kept = f"{report.kept} of {report.total} rows"
        if args.tokenization != "authors":  # whose rules cut otherwise
            lengths = tuple(_lengths_of(pair) for pair in pairs)
    found = _counted(pairs, pairs, args, kept)
    note = f"{kept}, the longest of {found.longest} tokens"
    return replace(found, note=note, lengths=lengths)


def _counted(
    pairs: list[TokenizedPair], longest: list[TokenizedPair], args: RMiPOConfig, note: str
) -> Workload:
    """The workload of these pairs; what a step takes at most is looked for in `longest`."""
    responses = sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs)
    each = tuple(batch.micro_step_tokens([pair], args.packing) for pair in pairs)
    most, step = _longest(longest, args)
    return Workload(len(pairs), most, step, sum(each), responses, responses, note, each)


def _longest(pairs: Iterable[TokenizedPair], args: RMiPOConfig) -> tuple[int, int]:
    """Tokens of the longest pair, and of an optimizer step of the longest."""
    tokens = (batch.micro_step_tokens([pair], args.packing) for pair in pairs)
    most = heapq.nlargest(args.pairs_per_step, tokens)
    return most[0], sum(most)


def shortened(work: Workload, max_length: int, args: RMiPOConfig) -> Workload:
    """The same pairs under a shorter `max_length`."""
    longest, step = _longest(
        (_pair(cut_lengths(of, max_length, args)) for of in work.lengths), args
    )
    each = tuple(min(length, longest) for length in work.each)
    return replace(work, longest=longest, step=step, each=each)


def cut_lengths(lengths: Lengths, max_length: int, args: RMiPOConfig) -> Lengths:
    """What `max_length` and the run's `max_prompt_length` leave of a prompt and its responses."""
    limits = TokenizationOptions(max_length=max_length, max_prompt_length=args.max_prompt_length)
    prompt = prompt_room(lengths, limits)
    left = max_length - prompt
    return prompt, min(lengths[1], left), min(lengths[2], left)


def _lengths_of(pair: TokenizedPair) -> Lengths:
    return len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids)


def _pair(lengths: Lengths) -> TokenizedPair:
    prompt, chosen, rejected = ([1] * length for length in lengths)
    return TokenizedPair(0, prompt, chosen, rejected)
