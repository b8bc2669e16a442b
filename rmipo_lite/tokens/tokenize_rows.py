"""Rows -> token pairs: options checked, the work shared out, every row accounted for.

What becomes of one row stands in `one_row`.
"""

import pickle
import warnings
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

from transformers import PreTrainedTokenizerBase

from rmipo_lite.data.columns import COLUMNS
from rmipo_lite.data.length_balance import fit_length_balance
from rmipo_lite.data.normalise import Message
from rmipo_lite.data.report import DataReport
from rmipo_lite.data.rows import Row, nothing_left
from rmipo_lite.tokens.encoder import TextEncoder
from rmipo_lite.tokens.one_row import Outcome, tokenize
from rmipo_lite.tokens.options import TokenizationOptions
from rmipo_lite.tokens.pair import TokenizedPair
from rmipo_lite.tokens.templates import prepare_tokenizer, render_prompt, require_template

MIN_ROWS_PER_PROCESS = 500  # below, starting a process costs more than it saves


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
        outcomes = tokenize(rows, tokenizer, options)
    counter = _Counter(report)
    pairs = counter.add(outcomes)
    counter.finish()
    if not pairs:
        raise ValueError(nothing_left(report))
    return pairs


def tokenize_in_chunks(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    options: TokenizationOptions,
    report: DataReport,
    rows_per_chunk: int,
) -> Iterator[list[Outcome]]:
    """What becomes of the rows, some at a time: `tokenize_rows` where the ids of all are too many.

    The report is complete when the iterator ends. All in this process: `options.num_proc` would
    start processes for every chunk.

    Raises:
        ValueError: as `tokenize_rows`, at the first chunk, or at the end where no pair is left.
    """
    tokenizer = prepare_tokenizer(tokenizer, options.chat_template)
    _check(rows, tokenizer, options)
    counter = _Counter(report)
    left = 0
    for start in range(0, len(rows), rows_per_chunk):
        outcomes = tokenize(rows[start : start + rows_per_chunk], tokenizer, options)
        left += len(counter.add(outcomes))
        yield outcomes
    counter.finish()
    if not left:
        raise ValueError(nothing_left(report))


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
    if all(not isinstance(row.prompt, str) for row in rows):
        require_template(tokenizer)  # else the rows that need one are refused, and the rest goes on


def _in_processes(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, options: TokenizationOptions
) -> list[Outcome] | None:
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
            jobs = [pool.submit(tokenize, chunk, tokenizer, options) for chunk in chunks]
            return [outcome for job in jobs for outcome in job.result()]
    except (pickle.PicklingError, TypeError, AttributeError, BrokenProcessPool) as error:
        warnings.warn(
            f"dataset_num_proc={options.num_proc}: worker processes can't be used "
            f"({type(error).__name__}: {str(error)[:200]}); tokenising in this one",
            stacklevel=3,
        )
        return None


class _Counter:
    """Moves outcomes into a report, as many at a time as there are; holds five ints a pair."""

    def __init__(self, report: DataReport) -> None:
        self._report = report
        self._lengths = {name: array("q") for name in COLUMNS}
        self._scored = array("q"), array("q")  # of chosen and rejected, as they are trained on
        self._labels = [0, 0]  # rows whose label is false, and true

    def add(self, outcomes: Sequence[Outcome]) -> list[TokenizedPair]:
        """Count these outcomes; the pairs that are left of them."""
        report = self._report
        pairs: list[TokenizedPair] = []
        for outcome in outcomes:
            report.special_token_rows += outcome.special_text
            report.identical_pairs += outcome.identical
            if outcome.pair is not None:
                pairs.append(outcome.pair)
                self._keep(outcome, outcome.pair)
                continue
            report.kept -= 1
            if outcome.refused:
                report.refuse(outcome.row, outcome.refused, outcome.example)
            else:
                report.drop(outcome.row, outcome.dropped, outcome.example)
        report.check()
        return pairs

    def _keep(self, outcome: Outcome, pair: TokenizedPair) -> None:
        report, is_pair = self._report, pair.label is None
        report.truncated_pairs += outcome.prompt_cut or outcome.responses_cut > 0
        report.truncated_prompts += outcome.prompt_cut
        report.truncated_responses += outcome.responses_cut
        report.chosen_longer_pairs += is_pair and outcome.lengths[1] > outcome.lengths[2]
        report.template_stripped += outcome.stripped
        report.template_rewritten += outcome.rewritten
        if is_pair:
            self._scored[0].append(len(pair.chosen_ids))
            self._scored[1].append(len(pair.rejected_ids))
        else:
            self._labels[bool(pair.label)] += 1
        own = (True, *pair.own_sides)
        for column, length, counts in zip(
            self._lengths.values(), outcome.lengths, own, strict=True
        ):
            if counts:
                column.append(length)

    def finish(self) -> None:
        """Store the lengths' percentiles, and what they say of the labels."""
        if any(self._labels):
            self._report.undesirable, self._report.desirable = self._labels
        self._report.set_lengths(**self._lengths)
        self._report.length_balance = fit_length_balance(*self._scored)
