"""What the optimizer steps of a run did: the numbers between two log lines, and over the whole run.

Every number is a mean over pairs that counted. A dropped step adds nothing, so no zero of it is
ever averaged in. What is not yet logged goes into the checkpoint too: a resumed run logs the same
lines as the uninterrupted one.

With `save_pair_values` every pair of every step is a line of `pair_values.jsonl`, from which the
log can be recomputed.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from rmipo_lite.config import RMiPOConfig
from rmipo_lite.data.length_balance import effective_sample
from rmipo_lite.output.console import say
from rmipo_lite.parallel.group import Group
from rmipo_lite.planning.device import peak_bytes
from rmipo_lite.step import pair_values
from rmipo_lite.step.pair_values import PairValues, StepOutcome

PAIR_VALUES_FILE = "pair_values.jsonl"


TIMES = ("rmipo/step_runtime", "rmipo/tokens_per_second", "rmipo/peak_memory")


class _Clock(TrainerCallback):
    """Seconds in optimizer steps since the last log line: no evaluation, no save among them."""

    def __init__(self) -> None:
        self.seconds, self._mark = 0.0, time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._mark = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stop()

    def stop(self) -> None:
        """Count up to now: a card is at work until somebody reads its numbers."""
        now = time.perf_counter()
        self.seconds, self._mark = self.seconds + now - self._mark, now


class RunLog:
    """Gathers step outcomes and turns them into log lines.

    Attributes:
        clock: to be called by the trainer.
        num_tokens: tokens read by the policy and the prior pass since the run began.
        dropped_pairs: pairs dropped as not finite: row and step.
    """

    def __init__(self, args: RMiPOConfig) -> None:
        self._args = args
        self.clock = _Clock()
        self._pair_file = (
            Path(str(args.output_dir)) / PAIR_VALUES_FILE if args.save_pair_values else None
        )
        self.clear()

    def clear(self) -> None:
        self.num_tokens = 0
        self.dropped_pairs: list[dict[str, int]] = []
        self._window: list[tuple[int, StepOutcome]] = []
        self._loss_total = 0.0  # summed over the logged pairs
        self._pairs_logged = 0
        self._tokens_logged = 0
        self.clock.seconds = 0.0

    def add(self, step: int, outcome: StepOutcome) -> None:
        """Take one optimizer step; `step` counts from 1."""
        self._window.append((step, outcome))
        self.num_tokens += outcome.num_tokens
        self.dropped_pairs += [{"row": pair.row, "step": step} for pair in outcome.dropped]

    def line(self, logs: dict[str, float]) -> dict[str, float]:
        """The trainer's log line with the means over the pairs since the last one."""
        if not self._window:
            return logs
        counted = [outcome for _, outcome in self._window if outcome.num_pairs]
        logs = dict(logs)
        if counted:
            total, num_pairs = self._waiting()
            logs["loss"] = total / num_pairs
            self._loss_total += total
            self._pairs_logged += num_pairs
        else:
            # Every pair since the last line was dropped: a zero here would look healthy.
            del logs["loss"]
        if not self._window[-1][1].num_pairs:
            logs.pop("grad_norm", None)  # of the last step, which has no gradient
        values = [part for outcome in counted for part in outcome.values]
        logs |= pair_values.reduce(values, self._args)
        if values:  # what an evaluation calls its loss; "loss" is all that is minimised
            logs["rmipo/pair_loss"] = float(torch.cat([part.loss for part in values]).mean())
        ends = [part for outcome in counted for part in outcome.end_nll]
        if ends:
            logs["rmipo/end_nll"] = float(torch.cat(ends).mean())
        weights = [weight for outcome in counted for weight in outcome.weights]
        if any(weight != 1 for weight in weights):
            logs["rmipo/effective_sample"] = effective_sample(weights)
        logs["num_tokens"] = float(self.num_tokens)
        if self.dropped_pairs:
            logs["rmipo/dropped_pairs"] = float(len(self.dropped_pairs))
        logs |= self._efficiency()
        self._write_pairs()
        self._window = []
        return logs

    def _efficiency(self) -> dict[str, float]:
        """Seconds of the steps since the last line, tokens a second, the peak of memory so far."""
        self.clock.stop()
        seconds, tokens = self.clock.seconds, self.num_tokens - self._tokens_logged
        self.clock.seconds, self._tokens_logged = 0.0, self.num_tokens
        peak = peak_bytes(self._args.device) / 2**30
        return dict(zip(TIMES, (seconds, tokens / max(seconds, 1e-9), peak), strict=True))

    @property
    def mean_loss(self) -> float | None:
        """Mean loss over every pair so far; None where none counted."""
        total, num_pairs = self._waiting()
        num_pairs += self._pairs_logged
        return (self._loss_total + total) / num_pairs if num_pairs else None

    def _waiting(self) -> tuple[float, int]:
        """(summed loss, number) of the pairs since the last line."""
        counted = [outcome for _, outcome in self._window if outcome.num_pairs]
        total = float(sum(outcome.loss * outcome.num_pairs for outcome in counted))
        return total, sum(outcome.num_pairs for outcome in counted)

    def _write_pairs(self) -> None:
        if self._pair_file is None or not Group.current().is_first:
            return
        lines = [
            json.dumps({"step": step, "row": row, "weight": weight, "end_nll": end, **numbers})
            + "\n"
            for step, outcome in self._window
            if outcome.num_pairs
            for row, weight, end, numbers in zip(
                outcome.rows, outcome.weights, _ends(outcome), _numbers(outcome.values), strict=True
            )
        ]
        try:
            self._pair_file.parent.mkdir(parents=True, exist_ok=True)
            with self._pair_file.open("a", encoding="utf-8") as file:
                file.writelines(lines)
        except OSError as error:
            say(f"WARNING: {self._pair_file} is no longer written: {error}")
            self._pair_file = None

    def _trim_pairs(self, first_step: int) -> None:
        """Take the lines from a step on out of the file: they are about to be written again."""
        if self._pair_file is None or not Group.current().is_first:
            return
        if not self._pair_file.is_file():
            return
        with self._pair_file.open(encoding="utf-8") as file:
            kept = [line for line in file if _step_of(line) < first_step]
        self._pair_file.write_text("".join(kept), encoding="utf-8")

    def state(self) -> dict[str, Any]:
        """Everything a resumed run needs to log the same lines."""
        return {
            "num_tokens": self.num_tokens,
            "dropped_pairs": self.dropped_pairs,
            "loss_total": self._loss_total,
            "pairs_logged": self._pairs_logged,
            "tokens_logged": self._tokens_logged,
            "seconds": self.clock.seconds,
            "window": [
                {
                    "step": step,
                    "loss": outcome.loss,
                    "num_pairs": outcome.num_pairs,
                    "rows": outcome.rows,
                    "weights": outcome.weights,
                    "end_nll": outcome.end_nll,
                    "values": [asdict(part) for part in outcome.values],
                }
                for step, outcome in self._window
            ],
        }

    def load_state(self, state: dict[str, Any], device: torch.device, step: int) -> None:
        """Go on where a checkpoint of `step` was saved."""
        self.num_tokens = state["num_tokens"]
        self.dropped_pairs = list(state["dropped_pairs"])
        self._loss_total = state["loss_total"]
        self._pairs_logged = state["pairs_logged"]
        self._tokens_logged = state.get("tokens_logged", self.num_tokens)  # absent in older ones
        self.clock.seconds = state.get("seconds", 0.0)
        self._window = [
            (
                entry["step"],
                StepOutcome(
                    loss=entry["loss"].to(device),
                    values=[
                        pair_values.restored(part, self._args, device) for part in entry["values"]
                    ],
                    rows=entry["rows"],
                    weights=entry.get("weights", [1.0] * len(entry["rows"])),
                    end_nll=[part.to(device) for part in entry.get("end_nll", [])],
                    num_pairs=entry["num_pairs"],
                ),
            )
            for entry in state["window"]
        ]
        self._trim_pairs(min([step + 1, *(first for first, _ in self._window)]))


def _numbers(parts: Sequence[PairValues]) -> list[dict[str, float | None]]:
    """The values of every pair; None where a PMI is undefined, since JSON has no NaN."""
    values = pair_values.concat(parts)
    names = list(PairValues.__dataclass_fields__)
    table = torch.stack([getattr(values, name) for name in names], dim=1).tolist()
    return [
        {
            name: number if number == number else None
            for name, number in zip(names, row, strict=True)
        }
        for row in table
    ]


def _ends(outcome: StepOutcome) -> list[float | None]:
    """The end's nll of every pair; None where it isn't anchored."""
    if not outcome.end_nll:
        return [None] * len(outcome.rows)
    ends: list[float | None] = torch.cat(outcome.end_nll).tolist()
    return ends


def _step_of(line: str) -> int:
    """The step of a line; one that was cut when the process died counts as unwritten."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 2**62
