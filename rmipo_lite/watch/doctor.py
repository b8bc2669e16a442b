"""The doctor: watches a run's numbers, says a finding when it first shows, and keeps them all."""

from dataclasses import replace
from typing import Any

from transformers import TrainerCallback

from rmipo_lite.config import RMiPOConfig
from rmipo_lite.data.report import DataReport
from rmipo_lite.output.console import say
from rmipo_lite.output.findings import Finding, Findings
from rmipo_lite.output.uncertainty import PairedValues
from rmipo_lite.watch.chart import Chart
from rmipo_lite.watch.completions import CLIPPED
from rmipo_lite.watch.symptoms import examine


class Doctor(TrainerCallback):
    """Reads every log line and evaluation of a trainer.

    Args:
        args: the run's options.
        pairs: how many pairs an evaluation is a mean over.

    Attributes:
        report, ends, learning_rate: as in `Chart`, set by whoever has them before training.
        held_out_values: of the evaluations, case by case; the trainer's own.
        shown_before: symptoms that were told otherwise already; found and kept, not said again.
    """

    def __init__(self, args: RMiPOConfig, pairs: int = 0) -> None:
        self._args = args
        self._pairs = pairs
        self.held_out_values = PairedValues()
        self.report: DataReport | None = None
        self.ends: tuple[str, str] | None = None
        self.learning_rate = 0.0
        self.is_anchored = True
        self.shown_before: set[str] = set()
        self._latest: dict[str, Any] | None = None
        self._before: dict[str, Any] | None = None
        self._found: dict[str, Finding] = {}

    @property
    def findings(self) -> Findings:
        """What was found so far, in the order it was."""
        return Findings(list(self._found.values()))

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An evaluation outside training is the one before it until training begins."""
        metrics = kwargs.get("metrics") or {}
        if "eval_loss" not in metrics:  # one of several sets by name, or cut short
            return
        self._latest = {**metrics, "step": 0}
        if state.global_step == 0:
            self._before = self._latest
        self._examine(state)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What an earlier run of the same trainer showed is not this one's."""
        if state.global_step == 0:  # else it goes on from a checkpoint
            self._before = self._latest
        self._found = {name: f for name, f in self._found.items() if f.steps == (0, 0)}
        self._examine(state)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A line of numbers has been added to the state's history."""
        self._examine(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say of which step the weights are, where `load_best_model_at_end` went back to one."""
        best = state.best_global_step
        if not args.load_best_model_at_end or not best or best == state.global_step:
            return
        found = Finding(
            "earlier_weights",
            f"the weights are those of step {best}, the best by {args.metric_for_best_model}, and "
            f"the run went on to step {state.global_step}",
            "What was found after that step is of other weights",
            level="note",
            steps=(best, best),
        )
        self._found[found.name] = found
        say(str(found))

    def _examine(self, state: Any) -> None:
        history = state.log_history
        held_out = [entry for entry in history if "eval_loss" in entry and entry.get("step")]
        chart = Chart(
            self._args,
            logs=[entry for entry in history if "loss" in entry],
            held_out=held_out if self._before is None else [self._before, *held_out],
            pairs=self._pairs,
            errors=self.held_out_values.errors,
            answers=self.held_out_values.counts.get(f"eval_{CLIPPED}", 0),
            max_steps=state.max_steps,
            report=self.report,
            ends=self.ends,
            learning_rate=self.learning_rate,
            is_anchored=self.is_anchored,
        )
        for finding in examine(chart):
            known = self._found.get(finding.name)
            if known is not None and known.steps == (0, 0):
                continue  # what was so before training stays so
            first = chart.step if known is None else known.steps[0]
            self._found[finding.name] = replace(finding, steps=(first, chart.step))
            if known is None and finding.name not in self.shown_before:
                say(str(self._found[finding.name]))
