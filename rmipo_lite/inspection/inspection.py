"""`inspect(dataset, model)`: look at preference pairs before training on them.

Without a model: what became of every row, faults of the texts, duplicates, contradicting labels,
lengths. With one: log-probs, PMI, gamma and loss weight of every pair before training, and the
pairs that look wrong. Texts stay the dataset's own; what is kept of a pair are its numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rmipo_lite.adapters.base_model import causal_lm
from rmipo_lite.checkpoints.sealed_folder import writable_folder
from rmipo_lite.config import NO_BACKWARD, RMiPOConfig
from rmipo_lite.data.report import DataReport
from rmipo_lite.data.rows import Row, load_rows, texts_of
from rmipo_lite.inspection import view
from rmipo_lite.inspection.facts import InspectionFacts
from rmipo_lite.inspection.pair_scores import PairScores, identity, score_pairs
from rmipo_lite.inspection.score_file import LENGTHS, SCORES_FILE, ScoreFile
from rmipo_lite.inspection.suspicious import candidates
from rmipo_lite.inspection.text_checks import TextFinding, TextReport, check_texts
from rmipo_lite.inspection.token_checks import TokenChecks
from rmipo_lite.model import batch, loading, names
from rmipo_lite.model.backbone import device_of
from rmipo_lite.output.console import say
from rmipo_lite.output.page import write_report
from rmipo_lite.parallel.group import refuse_several
from rmipo_lite.planning.half_range import keep_model_in_range
from rmipo_lite.planning.quantization import load_for_run
from rmipo_lite.step.make import autocast_of, make_step
from rmipo_lite.tokens.options import options_for, prior_front
from rmipo_lite.tokens.pair import TokenizedPair
from rmipo_lite.tokens.templates import prepare_tokenizer
from rmipo_lite.tokens.tokenize_rows import tokenize_in_chunks
from rmipo_lite.training.refusals import refuse_bad_weights, refuse_other_vocabulary
from rmipo_lite.training.restore import nothing_held, surroundings_restored

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROWS_PER_CHUNK = 512  # of which token ids are held at a time


class Inspection(InspectionFacts):
    """What `inspect` found. Prints as text, shows as tables and histograms in a notebook."""

    def __str__(self) -> str:
        return self.text()

    __repr__ = __str__

    def text(self, top: int = 3) -> str:
        """The findings for a terminal, with the `top` most suspicious pairs of each kind."""
        return view.text(self, top)

    def _repr_html_(self) -> str:
        return view.html(self, top=3)

    def plot(self) -> Figure:
        """Histograms of lengths and, with a model, of margin, PMI gap, gamma and weight.

        Matplotlib's; a notebook shows it as the last value of a cell, `savefig` writes it.
        """
        return view.figure(self)

    def report(self, path: str | Path, *, top: int = 10) -> Path:
        """Write one self-contained HTML page, with `top` suspicious pairs of each kind."""
        target = write_report(path, view.page(self, top))
        say(f"Report: {target}")
        return target


@nothing_held()
def inspect(
    dataset: Any,
    model: str | Path | PreTrainedModel | PeftModel | None = None,
    *,
    split: str | None = None,
    tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
    output_dir: str | Path | None = None,
    **config: Any,
) -> Inspection:
    """Look at preference pairs before training on them.

    Args:
        dataset: as for `train`.
        model: a name, a folder, a PreTrainedModel or a PeftModel, which scores every pair as it
            stands: nothing is attached, trained or left changed. None looks at the texts alone.
        split: which split of the dataset, as for `train`.
        tokenizer: a tokenizer, its name or its folder; None loads the model's own. Without either,
            lengths are in words.
        output_dir: where the scores of every pair go (`pair_scores.jsonl`); the same call goes on
            there after an interruption. None keeps no file.
        **config: any option of `RMiPOConfig`, for example `loss_type`, `beta`, `max_length`,
            `chat_template`. `dataset_num_proc` has no part here: rows are tokenised chunk by chunk
            in this process.

    Returns:
        Inspection: findings, numbers of every pair, the most suspicious ones.

    Raises:
        ValueError, TypeError: an option, a dataset or a model that can't be used, or a folder with
            the scores of something else.
    """
    model = str(model) if isinstance(model, Path) else model
    if not (model is None or isinstance(model, (str, nn.Module))):
        causal_lm(model)  # says what is wanted
    folder = None if output_dir is None else writable_folder(output_dir)
    refuse_several("inspect")
    with surroundings_restored("" if model is None else model):
        args = RMiPOConfig(output_dir=str(folder or "rmipo-inspection"), **NO_BACKWARD | config)
        rows, report = load_rows(dataset, split=split, unpaired=args.loss.unpaired)
        encoder = _tokenizer(tokenizer, model, args)
        loaded = None if model is None else _model(model, args)
        texts = check_texts(rows)
        name = "" if loaded is None else names.short_name(names.name_of(loaded))
        scores: PairScores | None = None
        found: list[TextFinding] = []
        if encoder is None:
            columns = _words(rows)
        else:
            columns, scores, found = _tokens(rows, report, encoder, loaded, args, folder)
        return _inspection(report, texts, columns, scores, found, name, args, rows)


def _inspection(
    report: DataReport,
    texts: TextReport,
    columns: dict[str, NDArray[Any]],
    scores: PairScores | None,
    found: list[TextFinding],
    name: str,
    args: RMiPOConfig,
    rows: Sequence[Row],
) -> Inspection:
    scored = {} if scores is None else scores.columns
    inspection = Inspection(
        data_report=report,
        findings=[*texts.findings, *found],
        near_duplicates=texts.near_duplicates,
        unit="tokens" if report.lengths else "words",
        columns=columns,
        scores=scores,
        model_name=name if scores is None or name else "a model made in memory",
        args=args,
        rows=rows,
        _similarity=texts.similarity,
        _candidates=candidates(rows, scored, texts.similarity),
    )
    bias = inspection.length_bias()[1]
    inspection.findings += [] if bias is None else [bias]
    return inspection


def _tokenizer(
    tokenizer: PreTrainedTokenizerBase | str | Path | None,
    model: str | nn.Module | None,
    args: RMiPOConfig,
) -> PreTrainedTokenizerBase | None:
    if tokenizer is None:
        if model is None:
            return None
        tokenizer = names.name_of(model)
    if isinstance(tokenizer, (str, Path)):
        tokenizer = loading.load_tokenizer(str(tokenizer))
    return prepare_tokenizer(tokenizer, args.chat_template)


def _model(model: str | nn.Module, args: RMiPOConfig) -> nn.Module:
    if isinstance(model, str):
        model = load_for_run(model, args)
    causal_lm(model)
    loading.protect_4bit_on_cpu(model)
    refuse_bad_weights(model)
    return model


def _words(rows: Sequence[Row]) -> dict[str, NDArray[Any]]:
    lengths = np.array([[len(text.split()) for text in texts_of(row)] for row in rows], np.int32)
    return dict(zip(LENGTHS, lengths.T, strict=True))


def _tokens(
    rows: Sequence[Row],
    report: DataReport,
    tokenizer: PreTrainedTokenizerBase,
    model: nn.Module | None,
    args: RMiPOConfig,
    folder: Path | None,
) -> tuple[dict[str, NDArray[Any]], PairScores | None, list[TextFinding]]:
    """(columns, scores where there is a model, what is wrong with the tokens)."""
    options = options_for(args, None if model is None else causal_lm(model).config)
    checks = TokenChecks(tokenizer, options)

    def chunks() -> Iterator[tuple[int, list[TokenizedPair]]]:
        outcomes = tokenize_in_chunks(rows, tokenizer, options, report, ROWS_PER_CHUNK)
        for start, some in zip(range(0, len(rows), ROWS_PER_CHUNK), outcomes, strict=True):
            checks.add(rows[start : start + ROWS_PER_CHUNK], some)
            pairs = [outcome.pair for outcome in some if outcome.pair is not None]
            if model is not None:
                refuse_other_vocabulary(pairs, model)
            yield start, pairs

    if model is None:
        columns = {name: np.zeros(len(rows), np.int32) for name in LENGTHS}
        place_of = {row.index: place for place, row in enumerate(rows)}
        for _, pairs in chunks():
            for pair in pairs:
                lengths = (len(pair.prompt_ids), *batch.scored_lengths(pair))
                for name, length in zip(LENGTHS, lengths, strict=True):
                    columns[name][place_of[pair.row]] = length
        return cast(dict[str, NDArray[Any]], columns), None, checks.findings()
    file = ScoreFile(
        folder, {} if folder is None else identity(model, tokenizer, rows, args, options)
    )
    scores = _scores(rows, chunks(), tokenizer, model, args, file, folder)
    return scores.columns, scores, checks.findings()


def _scores(
    rows: Sequence[Row],
    chunks: Iterator[tuple[int, list[TokenizedPair]]],
    tokenizer: PreTrainedTokenizerBase,
    model: nn.Module,
    args: RMiPOConfig,
    file: ScoreFile,
    folder: Path | None,
) -> PairScores:
    first: list[tuple[int, list[TokenizedPair]]] = []
    for chunk in chunks:  # up to the first that has a pair for the self-check
        first.append(chunk)
        if chunk[1]:
            break
    keep_model_in_range(model, first[-1][1], args)
    step = make_step(
        model,
        args,
        first[-1][1],
        tokenizer=tokenizer,
        prior_front=prior_front(args, tokenizer),
        autocast=autocast_of(args, device_of(model)),
    )
    step.max_tokens_no_grad, step.packing = file.begin(step.budget_no_grad, step.packing)
    if len(file):
        say(f"{len(file)} scored pairs are taken over from {folder}")
    try:
        return score_pairs(step, chain(first, chunks), rows, file)
    except KeyboardInterrupt:
        if folder is None:
            say("Stopped: nothing is kept; with output_dir= the next call goes on from there")
        else:
            say(
                f"Stopped: what is scored is in {folder / SCORES_FILE}; the same call goes on there"
            )
        raise
