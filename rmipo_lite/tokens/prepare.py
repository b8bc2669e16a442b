"""Load, options, tokenise: the one way from any dataset to token pairs."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from rmipo_lite.config import RMiPOConfig
from rmipo_lite.data.report import DataReport
from rmipo_lite.data.rows import LoadedRows, Row, load_rows
from rmipo_lite.output.console import say
from rmipo_lite.tokens.options import options_for
from rmipo_lite.tokens.pair import TokenizedPair
from rmipo_lite.tokens.tokenize_rows import tokenize_rows

_MANY = 10_000  # rows that take so long that something is said of it


class Prepared(NamedTuple):
    """A dataset ready to run: rows and report are absent where it came tokenised."""

    pairs: list[TokenizedPair]
    rows: list[Row]
    report: DataReport | None


def is_tokenized(dataset: Any) -> bool:
    """Whether these are pairs of ids already."""
    return (
        isinstance(dataset, Sequence)
        and len(dataset) > 0
        and all(isinstance(pair, TokenizedPair) for pair in dataset)
    )


def is_several(dataset: Any) -> bool:
    """Whether it is a plain dict of datasets by name, and not one dataset as a dict of columns."""
    return type(dataset) is dict and not {"chosen", "rejected", "completion"} & dataset.keys()


def prepare(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    args: RMiPOConfig,
    config: PretrainedConfig,
    *,
    argument: str = "dataset",
    split: str | None = None,
) -> Prepared:
    """Token pairs of a dataset for a model with this config.

    Args:
        dataset: any preference dataset, what `load_rows` gave for one, or a list of
            `TokenizedPair`, which is taken as it is.
        tokenizer: as `prepare_tokenizer` gives it.
        args: the options of the run.
        config: the model's, whose context is the longest pair.
        argument: what the caller calls the dataset, for errors.
        split: as for `load_rows`.

    Raises:
        ValueError: as `load_rows` and `tokenize_rows`.
    """
    if is_tokenized(dataset):
        if split is not None:
            raise ValueError(f"{argument}: split {split!r} was asked for of pairs of tokens")
        _check_labels(dataset, args, argument)
        return Prepared(list(dataset), [], None)
    is_loaded = isinstance(dataset, LoadedRows)
    if is_loaded:
        rows, report = dataset
        _check_labels(rows, args, argument)
    else:
        unpaired = args.loss.unpaired
        rows, report = load_rows(dataset, split=split, argument=argument, unpaired=unpaired)
    if len(rows) >= _MANY:
        say(f"Tokenising {len(rows):,} pairs")
    pairs = tokenize_rows(rows, tokenizer, options_for(args, config), report)
    return Prepared(pairs, rows, report)


def _check_labels(
    given: Sequence[TokenizedPair] | Sequence[Row], args: RMiPOConfig, argument: str
) -> None:
    """Raise ValueError for pairs where the method wants unpaired rows, or the other way round."""
    if any((one.label is not None) != args.loss.unpaired for one in given):
        wanted = "with a label, true or false" if args.loss.unpaired else "without a label"
        raise ValueError(f"{argument}: loss_type={args.loss_type!r} takes pairs {wanted}")
