"""What a model thinks of every pair, chunk by chunk.

Only one chunk's token ids exist at a time; what stays of a pair are its numbers, in memory and in a
`ScoreFile`. Which pairs go through the model together follows from the chunk alone and not from
what is done already, so an interrupted run that goes on has the same numbers to the last bit.
"""

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from rmipo_lite.checkpoints.weights import fingerprint
from rmipo_lite.config import RMiPOConfig
from rmipo_lite.data.rows import Row
from rmipo_lite.inspection.score_file import LENGTHS, NUMBERS, Numbers, ScoreFile
from rmipo_lite.methods.formulas import MethodOptions
from rmipo_lite.methods.table import SumLoss
from rmipo_lite.model import batch
from rmipo_lite.model.backbone import evaluating
from rmipo_lite.model.names import name_of
from rmipo_lite.ops.devices import in_float64
from rmipo_lite.output.console import duration, say
from rmipo_lite.step import pair_values
from rmipo_lite.step.losses import memory_of, solve
from rmipo_lite.step.pair_step import PairStep
from rmipo_lite.step.pair_values import PairValues
from rmipo_lite.tokens.options import TokenizationOptions
from rmipo_lite.tokens.pair import TokenizedPair

_SAY_EVERY = 10.0  # seconds between two lines about the progress
_OWN_MEANS = ("loss", "weight")
# Options that change a pair's numbers.
OPTIONS = (
    "loss_type", "gamma_min", "gamma_max", "gamma_scaled_by_beta", *MethodOptions._fields,
    "ld_alpha", "prior_context", "bf16", "fp16", "kernel_impl",
)  # fmt: skip


@dataclass(frozen=True)
class PairScores:
    """Numbers of every row by column; NaN where a row has none.

    Attributes:
        columns: `LENGTHS` (int32, tokens, 0 where the row has no pair) and `NUMBERS` (float32:
            logps, priors and PMI in nats per token, gamma in reward units, the loss's own unit).
        scored: (rows,) whether the row has a pair that went through the model.
        labels: (rows,) of unpaired rows, 1 and 0; NaN of pairs.
        taken_over: how many pairs an earlier call had scored.
    """

    columns: dict[str, NDArray[Any]]
    scored: NDArray[np.bool_]
    labels: NDArray[Any]
    taken_over: int = 0

    @property
    def finite(self) -> NDArray[np.bool_]:
        """(rows,) scored pairs whose loss and log-probs are numbers."""
        names = ("loss", "chosen_logps", "rejected_logps")
        return self.scored & np.logical_and.reduce([np.isfinite(self.columns[n]) for n in names])


def score_pairs(
    step: PairStep,
    chunks: Iterable[tuple[int, Sequence[TokenizedPair]]],
    rows: Sequence[Row],
    file: ScoreFile,
) -> PairScores:
    """Run every pair through the model once, without a gradient.

    Args:
        step: the model with its budget, set by `ScoreFile.begin`.
        chunks: (rows behind it, pairs) one after the other, in the order of the rows.
        rows: the dataset, for the columns' length and order.
        file: what is there already, and where the rest goes.

    A KeyboardInterrupt leaves everything scored so far in the file.
    """
    columns: dict[str, NDArray[Any]] = {name: np.zeros(len(rows), np.int32) for name in LENGTHS}
    columns |= {name: np.full(len(rows), np.nan, np.float32) for name in NUMBERS}
    scored = np.zeros(len(rows), np.bool_)
    place_of = {row.index: place for place, row in enumerate(rows)}
    taken_over = 0

    def keep(row: int, numbers: Numbers) -> None:
        place = place_of[row]
        scored[place] = True
        for name, value in numbers.items():
            columns[name][place] = value

    progress = _Progress(len(rows))
    with evaluating(step.model):
        for rows_behind, pairs in chunks:
            known = [pair.row for pair in pairs if pair.row in file]
            for row in known:
                keep(row, file.numbers(row))
            taken_over += len(known)
            for part, values in step.evaluate(_undone(step, pairs, file)):
                numbers = _numbers(part, values, step.args)
                file.add([pair.row for pair in part], numbers)
                for pair, of_pair in zip(part, numbers, strict=True):
                    if pair.row not in file:
                        keep(pair.row, of_pair)
                progress.tell(rows_behind, len(part))
            file.sync()
            progress.next_chunk()
    labels = np.array([np.nan if row.label is None else row.label for row in rows], np.float32)
    return PairScores(columns, scored, labels, taken_over)


def _undone(step: PairStep, pairs: Sequence[TokenizedPair], file: ScoreFile) -> list[TokenizedPair]:
    """The pairs of the micro-steps that aren't all done; cut again they give the same ones.

    Half a micro-step would not do: its pairs' last bits depend on what runs beside them.
    """
    parts = batch.split_by_budget(pairs, step.budget_no_grad, step.packing)
    wanted = {p.row for part in parts if any(p.row not in file for p in part) for p in part}
    return [pair for pair in pairs if pair.row in wanted]


def _numbers(
    pairs: Sequence[TokenizedPair], values: PairValues, args: RMiPOConfig
) -> list[Numbers]:
    """Every column of these pairs, rounded to float32."""
    undefined = values.chosen_pmi.isnan() | values.rejected_pmi.isnan()
    table = {
        "chosen_logps": values.chosen_logps,
        "rejected_logps": values.rejected_logps,
        "chosen_prior_logps": values.chosen_logps - values.chosen_pmi,
        "rejected_prior_logps": values.rejected_logps - values.rejected_pmi,
        "chosen_pmi": values.chosen_pmi,
        "rejected_pmi": values.rejected_pmi,
        # NaN, not the 0 that the loss takes, where a side has no PMI.
        "pmi_gap": torch.where(undefined, torch.nan, values.pmi_gap),
        "gamma": values.gamma,
        "loss": values.loss,
        "weight": loss_weight(values, args).float().to(values.loss.device),
        "chosen_reward": values.chosen_reward,
        "rejected_reward": values.rejected_reward,
    }
    lengths = torch.stack([values.chosen_length, values.rejected_length], 1).tolist()
    rows = torch.stack([table[name].float() for name in NUMBERS], dim=1).tolist()
    return [
        dict(zip(LENGTHS, (len(pair.prompt_ids), *map(int, sides)), strict=True))
        | dict(zip(NUMBERS, row, strict=True))
        for pair, sides, row in zip(pairs, lengths, rows, strict=True)
    ]


def loss_weight(values: PairValues, args: RMiPOConfig) -> torch.Tensor:
    """How strongly a pair pulls, (P,) float64: |d loss / d chosen_logps|, without the factor beta.

    For the logistic losses that is sigma(-z), for hinge 1 or 0. A loss without beta, as simper, has
    it as it is: the chosen response's inverse perplexity. Of a loss of sums it is the derivative in
    the chosen side's sum.
    """
    loss = args.loss
    chosen, rejected = in_float64(values.chosen_logps), in_float64(values.rejected_logps)
    if isinstance(loss, SumLoss):
        lengths = torch.stack([values.chosen_length, values.rejected_length], 1).flatten()
        sums = torch.stack([chosen, rejected], 1).flatten() * in_float64(lengths)
        labels = values.label if loss.unpaired else None
        solved = solve(
            sums, lengths.long().to(sums.device), None, args, memory_of(args), None, labels,
            training=False,
        )  # fmt: skip
        own = torch.where(values.has_chosen.to(solved.device), solved[:, 1], solved[:, 2])
        return own.abs() / args.beta
    _, slope, _ = loss.formula(chosen, rejected, in_float64(values.gamma), args.pair_options)
    return slope.abs() / (args.beta if loss.has_beta else 1.0)


def mean_scores(scores: PairScores, args: RMiPOConfig) -> dict[str, float]:
    """Means over the finite pairs, as an evaluation gives them, with `loss` and `weight`.

    `rmipo/dropped_pairs` counts the scored pairs that are not finite; where none is finite, it is
    all there is.
    """
    finite = scores.finite
    dropped = {"rmipo/dropped_pairs": float((scores.scored & ~finite).sum())}
    if not finite.any():
        return dropped
    columns = {**scores.columns, "label": scores.labels}
    values = {
        name: torch.from_numpy(columns[name][finite]).double()
        for name in PairValues.__dataclass_fields__
    }
    values["pmi_gap"] = values["pmi_gap"].nan_to_num(0.0)  # as the loss takes it
    own = {name: float(scores.columns[name][finite].mean(dtype=float)) for name in _OWN_MEANS}
    return own | pair_values.reduce([PairValues(**values)], args) | dropped


class _Progress:
    """A line every few seconds: how far, how long still."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._began = self._last = time.monotonic()
        self._in_chunk = 0  # pairs of the chunk in progress
        self._worked = 0  # pairs that the model scored in this call

    def tell(self, rows_behind: int, pairs: int) -> None:
        """Count a micro-step of the chunk that begins after `rows_behind` rows."""
        self._in_chunk += pairs
        self._worked += pairs
        now = time.monotonic()
        if now - self._last < _SAY_EVERY:
            return
        self._last = now
        done = min(self._total, rows_behind + self._in_chunk)
        left = (self._total - done) * (now - self._began) / self._worked
        say(f"Scored {done} of {self._total} rows, about {duration(left)} left")

    def next_chunk(self) -> None:
        """Forget the micro-steps of a chunk that is whole."""
        self._in_chunk = 0


def identity(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    args: RMiPOConfig,
    options: TokenizationOptions,
) -> dict[str, Any]:
    """What scores depend on, for the header of their file: model, tokenizer, data, options."""
    tokens = sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    tokens.update(json.dumps([tokenizer.chat_template, tokenizer.all_special_tokens]).encode())
    data = sha256()
    for row in rows:
        data.update(json.dumps([row.index, row.prompt, row.chosen, row.rejected]).encode())
    active = model.active_adapters if isinstance(model, PeftModel) else ()
    named = {name: getattr(args, name) for name in OPTIONS}
    named |= {
        "max_length": options.max_length,
        "max_prompt_length": options.max_prompt_length,
        "tokenization": options.mode,
        "truncation_mode": options.truncation_mode,
    }
    return {
        "model_name": name_of(model),
        "model": " ".join([fingerprint(model.named_parameters()), *active]),
        "tokenizer": tokens.hexdigest(),
        "dataset": {"rows": len(rows), "sha256": data.hexdigest()},
        "options": named,
    }
