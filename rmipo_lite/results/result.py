"""`TrainResult`: what a run returns. It plots, generates, compares, saves, merges and reports."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel

from rmipo_lite.checkpoints.weights import save_run
from rmipo_lite.model.generation import Answer, Prompt
from rmipo_lite.output import page, plots
from rmipo_lite.output.console import say
from rmipo_lite.output.figures import Figures
from rmipo_lite.output.redaction import without_paths
from rmipo_lite.output.table import html_table
from rmipo_lite.parallel.group import Group
from rmipo_lite.parallel.sharded import whole
from rmipo_lite.results import run_page
from rmipo_lite.results.comparison import AnswerComparison
from rmipo_lite.results.conversation import Conversation
from rmipo_lite.results.figures import figures_of
from rmipo_lite.results.judged import JudgedModel
from rmipo_lite.results.model_card import METRIC_HEAD, metric_rows, model_card
from rmipo_lite.results.record import RunRecord
from rmipo_lite.results.run_file import RunNumbers, write_numbers

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(repr=False)
class TrainResult(RunRecord, JudgedModel):
    """The outcome of a run: `RunRecord` says what it holds; this is what can be done with it."""

    _samples: AnswerComparison | None = field(default=None, init=False)
    _conversation: Conversation | None = field(default=None, init=False)
    _kept: dict[str, list[Answer]] = field(default_factory=dict, init=False)

    def _repr_html_(self) -> str:
        rows = metric_rows(self)
        parts = [f"<p><b>{html.escape(repr(self))}</b></p>"]
        if self.findings:
            parts.append(self.findings._repr_html_())
        if rows:
            parts.append(html_table(METRIC_HEAD, rows))
        if self._samples is not None and len(self._samples):
            parts.append(self._samples._repr_html_())
        parts += [run_page.curves(self.history), self.data_report._repr_html_()]
        return "".join(parts)

    def plot(self) -> Figure:
        """Loss, accuracy, margin, gamma, PMI gap and lengths over the steps, in one figure.

        Matplotlib's; a notebook shows it as the last value of a cell, `savefig` writes it.
        """
        return plots.figure(self.history)

    def figures(self) -> Figures:
        """The paper's figures from this run, each with a caption; a notebook shows them all.

        Gamma by PMI gap, reward differences before and after, accuracy by PMI gap and by length,
        dynamics, efficiency; `figures()["gamma"].figure` is matplotlib's, `save(folder)` writes
        PNGs.
        """
        measured = self.held_out
        return figures_of(RunNumbers(self.history, measured.first, measured.newest))

    def to_pandas(self) -> pd.DataFrame:
        """The history as a DataFrame, one row for each log line."""
        import pandas as pd

        return pd.DataFrame(self.history)

    def save(self, folder: str | Path) -> Path:
        """Save adapter (safetensors), tokenizer with its template, options and a model card.

        Of several processes the first writes; of a model in parts (FSDP2) all must call it.
        """
        with whole(self.model, everything=not isinstance(self.model, PeftModel)):
            if Group.current().is_first:
                self._write(Path(folder), self.model, model_card(self))
        return Path(folder)

    def _write_run(self, model: Any, folder: Path) -> None:
        save_run(model, self.tokenizer, self.args, folder)
        write_numbers(folder, self.history, self.held_out)

    def _merged_card(self, how: str) -> str:
        return model_card(self, merged=how)

    def push_to_hub(self, repo_id: str, *, private: bool = True, token: str | None = None) -> str:
        """Upload what `save` writes, and the report, to a hub repository; its address.

        It is made private unless told otherwise. No path of this machine goes with it: a base
        model that was loaded from one is named by its folder.
        """
        import tempfile

        from huggingface_hub import HfApi

        is_first = Group.current().is_first  # of several processes, which uploads
        api = HfApi(token=token)
        url = api.create_repo(repo_id, private=private, exist_ok=True) if is_first else repo_id
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            self.save(folder)
            if not is_first:
                return repo_id
            taken = without_paths(Path(folder))
            shown = run_page.report_html(self, self._samples)
            page.write_report(Path(folder) / page.RUN_FILE, shown)
            if "adapter_config.json" in taken:
                say(
                    "adapter_config.json names its base model without the folder it was loaded "
                    "from; put in its hub name there, so that others find it"
                )
            api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload adapter")
        return str(url)

    def report(
        self,
        path: str | Path | None = None,
        *,
        prompts: Sequence[Prompt] = (),
        extra_sections: Sequence[tuple[str, str]] = (),
    ) -> Path:
        """Write one self-contained HTML file about the run; returns its path.

        Args:
            path: the file; None writes `run.html` into `output_dir`.
            prompts: compared before and after for the page; without any, the samples of the last
                `compare` are shown.
            extra_sections: (title, HTML) pairs; the HTML is taken as it is.
        """
        samples = self.compare(prompts) if prompts else self._samples
        whole = run_page.report_html(self, samples, extra_sections)
        target = page.write_report(self.output_dir / page.RUN_FILE if path is None else path, whole)
        say(f"Report: {target}")
        return target
