"""`RunRecord`: what a run was, as it is kept, shown and written; it does nothing."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from rmipo_lite.config import RMiPOConfig
from rmipo_lite.data.report import DataReport
from rmipo_lite.model.generation import Prompt
from rmipo_lite.model.names import short_name
from rmipo_lite.output import held_out
from rmipo_lite.output.console import printable
from rmipo_lite.output.findings import Findings
from rmipo_lite.output.uncertainty import PairedValues
from rmipo_lite.training.rehearsal import Plan


@dataclass(repr=False)
class RunRecord:
    """What a run was: numbers, log, data, findings, and the model it left.

    Attributes:
        model: the trained model with its adapter.
        tokenizer: the tokenizer as it was used.
        args: the options of the run.
        metrics: numbers at the end, `eval_` for the held-out pairs.
        metrics_before: the held-out numbers before the first step.
        errors: standard errors by the names of `metrics`: of the change from before (paired, case
            by case), or of the number itself where nothing was measured before.
        history: the log, one dict for each log line (`trainer.state.log_history`).
        data_report: what became of every row of the dataset.
        output_dir: the folder of the run.
        stopped_at_step: the step a Ctrl-C stopped the run at, None when it ran to its end.
        conversational: whether prompts are rendered by the chat template.
        plan: what the run was expected to take, before its first step.
        findings: what the doctor found, in plain words; prints and shows as a table.
        unsaved: why the adapter could not be saved at the end; None when it was.
        held_out: every held-out case's values behind `metrics`, before and after.
        held_out_prompts: prompts of held-out pairs, which `compare` answers when given none.
        held_out_chosen: the chosen response to each of them; None where a row has none.
        start: the adapter's weights at step 0, by name; None where the model was trained in full.
        went_on: whether the model had an adapter, which was trained further.
        weights_step: the step that the weights are of where `load_best_model_at_end` chose it.
        learning_rate: the peak rate; that which was found where the options say "auto".
    """

    model: Any
    tokenizer: Any
    args: RMiPOConfig
    metrics: dict[str, float]
    metrics_before: dict[str, float]
    history: list[dict[str, float]]
    data_report: DataReport
    output_dir: Path
    stopped_at_step: int | None = None
    conversational: bool = False
    plan: Plan | None = None
    findings: Findings = field(default_factory=Findings)
    unsaved: str | None = None
    held_out_prompts: list[Prompt] = field(default_factory=list)
    held_out_chosen: list[str | None] = field(default_factory=list)
    start: dict[str, Tensor] | None = None
    went_on: bool = False
    weights_step: int | None = None
    learning_rate: float | None = None
    errors: dict[str, float] = field(default_factory=dict)
    held_out: PairedValues = field(default_factory=PairedValues)

    @property
    def base_model_name(self) -> str:
        """Name or folder of the base model; empty for one made in memory."""
        config = getattr(self.model, "config", None)
        return str(getattr(config, "_name_or_path", "") or "")

    @property
    def headline(self) -> str:
        """The run in one line: steps, then accuracy and margin before -> after."""
        step = int(max((entry.get("step", 0) for entry in self.history), default=0))
        parts = [f"{step} steps" if self.stopped_at_step is None else f"stopped at step {step}"]
        if self.weights_step is not None:
            parts.append(f"weights of step {self.weights_step}")
        if self.unsaved is not None:
            parts.append("NOT SAVED")
        elif self.stopped_at_step is not None:
            parts.append("saved")
        if self.args.learning_rate == "auto" and self.learning_rate is not None:
            parts.append(f"learning rate {self.learning_rate:.2g} (found)")
        for name, label in (("rewards/accuracies", "accuracy"), ("rewards/margins", "margin")):
            for key, of_set in held_out.names_of(name, self.metrics):
                after, before = self.metrics[key], self.metrics_before.get(key)
                arrow = f"{after:.3f}" if before is None else f"{before:.3f} -> {after:.3f}"
                error = self.errors.get(key, math.nan)
                sure = f" (+- {error:.3f})" if math.isfinite(error) else ""
                parts.append(f"{held_out.label('held-out', of_set)} {label} {arrow}{sure}")
        if self.findings:
            parts.append(f"findings: {', '.join(self.findings.names)}")
        return ", ".join(parts)

    def __repr__(self) -> str:
        name = short_name(self.base_model_name) or type(self.model).__name__
        return printable(f"{type(self).__name__}({name}: {self.headline}; {self.output_dir})")
