"""How often a model prefers the chosen side of somebody's pairs, by subset, as RewardBench counts.

Its reward is that of the method it was trained by: the scaled mean log-probability, or what it says
more than the model at step 0 did.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from rmipo_lite.adapters.base_model import causal_lm
from rmipo_lite.config import NO_BACKWARD, RMiPOConfig
from rmipo_lite.data.rows import load_rows
from rmipo_lite.methods import table
from rmipo_lite.model.backbone import device_of, evaluating
from rmipo_lite.model.names import name_of, short_name
from rmipo_lite.output.console import say
from rmipo_lite.output.table import html_table, text_table
from rmipo_lite.output.uncertainty import share_text
from rmipo_lite.parallel.group import refuse_several
from rmipo_lite.step.make import autocast_of, make_step
from rmipo_lite.step.reference import Reference, key_of
from rmipo_lite.system.files import refuse_existing, write_whole
from rmipo_lite.tokens.options import prior_front
from rmipo_lite.tokens.prepare import prepare

if TYPE_CHECKING:
    import pandas as pd

_ALL = "all rows"
# RewardBench's sections (rewardbench 0.1.4, constants.py): subset -> what it counts for.
SECTIONS: dict[str, dict[str, int]] = {
    "Chat": {
        "alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95,
        "mt-bench-easy": 28, "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92, "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100, "refusals-offensive": 100, "xstest-should-refuse": 154,
        "xstest-should-respond": 250, "donotanswer": 136,
    },
    "Reasoning": {
        "math-prm": 984, "hep-cpp": 164, "hep-go": 164, "hep-java": 164, "hep-js": 164,
        "hep-python": 164, "hep-rust": 164,
    },
}  # fmt: skip


class ScoredPair(NamedTuple):
    """A row of the pairs, with the rewards of both its sides."""

    row: int
    subset: str
    chosen: float
    rejected: float


@dataclass(frozen=True, repr=False)
class PairAccuracy:
    """Accuracy by subset: the share of pairs whose chosen side has the higher reward.

    Attributes:
        pairs: every pair that was scored, in the order of the rows.
        model, tokenizer: by name, for RewardBench's columns.
        reward: what the rewards are, in words.
        left_out: rows without a usable pair, or whose reward is no number.
        cut: pairs that were cut to the longest text that is read.
    """

    pairs: list[ScoredPair]
    model: str
    tokenizer: str
    chat_template: bool
    reward: str
    left_out: int = 0
    cut: int = 0

    @property
    def accuracy(self) -> float:
        """Over all pairs; where both sides have the same reward, the pair isn't won."""
        return _share(self.pairs)

    @property
    def by_subset(self) -> dict[str, float]:
        """Subset -> accuracy; empty where the rows name none."""
        return {name: _share(pairs) for name, pairs in self._grouped().items()}

    @property
    def sections(self) -> dict[str, float]:
        """RewardBench's, of those whose subsets are among these, weighted as it does."""
        found = self.by_subset
        named = {
            section: {subset: n for subset, n in subsets.items() if subset in found}
            for section, subsets in SECTIONS.items()
        }
        return {
            section: sum(found[subset] * n for subset, n in own.items()) / sum(own.values())
            for section, own in named.items()
            if own
        }

    def _grouped(self) -> dict[str, list[ScoredPair]]:
        names = dict.fromkeys(pair.subset for pair in self.pairs if pair.subset)
        return {name: [pair for pair in self.pairs if pair.subset == name] for name in names}

    def _rows(self) -> list[tuple[str, str, str]]:
        grouped = self._grouped()
        parts = [*(grouped.items() if len(grouped) > 1 else ()), (_ALL, self.pairs)]
        rows = [(name, str(len(some)), share_text(_share(some), len(some)))
                for name, some in parts]  # fmt: skip
        return rows + [(f"section {name}", "", f"{v:.1%}") for name, v in self.sections.items()]

    def __str__(self) -> str:
        left = f"; {self.left_out} rows left out" if self.left_out else ""
        left += f"; {self.cut} pairs cut" if self.cut else ""
        head = f"{self.model}, by {self.reward}{left}"
        return "\n".join([head, *text_table(_HEAD, self._rows(), right=(1, 2))])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(_HEAD, self._rows())

    def to_pandas(self) -> pd.DataFrame:
        """A row a pair."""
        import pandas as pd

        return pd.DataFrame(self.pairs, columns=ScoredPair._fields)

    def write(self, path: str | Path) -> Path:
        """RewardBench's two files: numbers at `path`, every pair's rewards beside it (_all.jsonl).

        Returns:
            The first one's path.

        Raises:
            FileExistsError: one of them is there.
        """
        target = Path(path)
        numbers = {
            "accuracy": self.accuracy, "num_prompts": len(self.pairs), "model": self.model,
            "ref_model": None, "tokenizer": self.tokenizer,
            "chat_template": "tokenizer" if self.chat_template else None,
            "extra_results": self.by_subset or None,
        }  # fmt: skip
        lines = [json.dumps({"chosen": p.chosen, "rejected": p.rejected}) for p in self.pairs]
        texts = {
            target: json.dumps(numbers),
            target.with_name(f"{target.stem}_all.jsonl"): "\n".join(lines),
        }
        refuse_existing(*texts)
        for file, text in texts.items():
            write_whole(file, text + "\n")
        return target


_HEAD = ("subset", "pairs", "accuracy (95 %)")


def _share(pairs: Sequence[ScoredPair]) -> float:
    return sum(pair.chosen > pair.rejected for pair in pairs) / len(pairs)


def score_pairs(
    dataset: Any,
    split: str | None,
    model: Any,
    tokenizer: Any,
    args: RMiPOConfig,
    at_start: Callable[[], AbstractContextManager[Any]],
) -> PairAccuracy:
    """Score the pairs of any preference dataset whose rows may name a `subset`.

    Args:
        dataset, split: as for `train`.
        model, tokenizer: as a run left them.
        args: the options of the run.
        at_start: puts the model of step 0 in force, from which `dpo` and its kind measure.

    Raises:
        ValueError: no usable pair, or none whose reward is a number.
    """
    refuse_several("score_pairs")
    args = _for_pairs(args)
    data = load_rows(dataset, split=split)
    pairs = prepare(data, tokenizer, args, causal_lm(model).config).pairs
    step = make_step(
        model, args, pairs, tokenizer=tokenizer, prior_front=prior_front(args, tokenizer),
        autocast=autocast_of(args, device_of(model)),
    )  # fmt: skip
    cut = data.report.truncated_pairs
    more = f", {cut} of them cut to {args.max_length} tokens or the model's context" if cut else ""
    say(f"Scoring {len(pairs)} of {data.report.total} pairs{more}")
    with evaluating(model):
        if args.loss.needs_reference:
            step.reference = Reference(step, {})
            with at_start():
                sums = step.response_sums(pairs)
                step.reference.known = {key_of(pair): of_pair for pair, of_pair in sums}
        subsets = {row.index: row.subset for row in data.rows}
        found = sorted(_scored(step.evaluate(pairs), subsets))
    kept = [pair for pair in found if pair.chosen == pair.chosen and pair.rejected == pair.rejected]
    if not kept:
        raise ValueError("dataset: no pair has a reward that is a number")
    more = ", less the model's at step 0" if args.loss.needs_reference else ""
    return PairAccuracy(
        kept, short_name(name_of(model)) or "model", short_name(tokenizer.name_or_path),
        bool(tokenizer.chat_template), f"{args.loss_type}'s reward{more}",
        data.report.total - len(kept), cut,
    )  # fmt: skip


def _for_pairs(args: RMiPOConfig) -> RMiPOConfig:
    """The run's options for a look at pairs, whatever it trained on."""
    changed: dict[str, Any] = {"prior": "live", "reference": "cached", "ref_sync_steps": None}
    changed |= NO_BACKWARD
    if args.loss.unpaired:  # whose reward of either side is the one that dpo compares
        changed |= dict.fromkeys(table.defaults_of(args.loss_type))
        changed |= {"loss_type": "dpo", "beta": args.beta}
    return replace(args, **changed)


def _scored(parts: Any, subsets: Mapping[int, str]) -> Iterator[ScoredPair]:
    for pairs, values in parts:
        both = torch.stack([values.chosen_reward, values.rejected_reward], 1).tolist()
        for pair, (chosen, rejected) in zip(pairs, both, strict=True):
            yield ScoredPair(pair.row, subsets[pair.row], chosen, rejected)
