"""`TrainResult`: what a run returns. It plots, generates, compares, saves, merges and reports.

It holds the trained model itself, not a copy: before/after comparisons switch the adapter off and
on, so they cost no memory.
"""

from __future__ import annotations

import contextlib
import html
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from rmipo_lite.adapters import start
from rmipo_lite.adapters.merge import merged_copy
from rmipo_lite.checkpoints.sealed_folder import files_put_in_place
from rmipo_lite.checkpoints.weights import save_run
from rmipo_lite.model.generation import Answer, Prompt, generate_answers, prompt_ids
from rmipo_lite.output import page, plots
from rmipo_lite.output.console import say
from rmipo_lite.output.table import html_table
from rmipo_lite.results import run_page
from rmipo_lite.results.agreement import agreement
from rmipo_lite.results.comparison import Comparison
from rmipo_lite.results.model_card import METRIC_HEAD, metric_rows, model_card
from rmipo_lite.results.record import RunRecord
from rmipo_lite.system.files import is_empty

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(repr=False)
class TrainResult(RunRecord):
    """The outcome of a run: `RunRecord` says what it holds; this is what can be done with it."""

    _samples: Comparison | None = field(default=None, init=False)

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

    def to_pandas(self) -> pd.DataFrame:
        """The history as a DataFrame, one row for each log line."""
        import pandas as pd

        return pd.DataFrame(self.history)

    def generate(
        self, prompts: Sequence[Prompt], max_new_tokens: int = 128, **options: Any
    ) -> list[Answer]:
        """Answers of the trained model: texts whose `ended` is False where the limit cut them.

        Args:
            prompts: texts or message lists. After a conversational run a text is one user turn.
            max_new_tokens: longest answer, tokens.
            **options: those of `model.generate`; greedy unless `do_sample=True`.
        """
        return generate_answers(
            self.model,
            self.tokenizer,
            prompts,
            conversational=self.conversational,
            max_new_tokens=max_new_tokens,
            **options,
        )

    @contextlib.contextmanager
    def adapter_off(self) -> Iterator[Any]:
        """The model without its adapter, inside the `with` block."""
        with start.adapter_off(self._adapted("before/after")):
            yield self.model

    @contextlib.contextmanager
    def at_start(self) -> Iterator[Any]:
        """The model as it was at step 0, inside the `with` block."""
        adapted = self._adapted("before/after")
        if self.start is None:
            with start.adapter_off(adapted):
                yield self.model
        else:
            with start.swapped(adapted, self.start):
                yield self.model

    def _adapted(self, what: str) -> PeftModel:
        if not isinstance(self.model, PeftModel):
            raise TypeError(
                f"model: {what} needs an adapter, and this model has none "
                f"({type(self.model).__name__} was trained in full)"
            )
        return self.model

    def compare(
        self, prompts: Sequence[Prompt] | None = None, max_new_tokens: int = 128, **options: Any
    ) -> Comparison:
        """Answers before and after training, side by side; printed or shown as a table.

        Args:
            prompts: as for `generate`; None takes `held_out_prompts`.
            max_new_tokens, **options: as for `generate`.

        Before is the model at step 0: of a new adapter the base model, of one that went on what it
        had learnt before. The last comparison is shown with the result and in its report.
        """
        prompts = self.held_out_prompts if prompts is None else prompts
        with self.at_start():
            before = self.generate(prompts, max_new_tokens, **options)
        after = self.generate(prompts, max_new_tokens, **options)
        self._samples = Comparison(list(prompts), before, after)
        return self._samples

    def save(self, folder: str | Path) -> Path:
        """Save adapter (safetensors), tokenizer with its template, options and a model card."""
        return self._write(Path(folder), self.model, model_card(self))

    def _write(self, target: Path, model: Any, card: str) -> Path:
        """All at once: a full disk or a kill leaves what was there before."""
        with files_put_in_place(target) as staged:
            save_run(model, self.tokenizer, self.args, staged)
            (staged / "README.md").write_text(card, encoding="utf-8")
        return target

    def merge(
        self, folder: str | Path | None = None, *, dtype: torch.dtype | None = None
    ) -> PreTrainedModel:
        """A copy of the model with the adapter's weights added in; saved where a folder is given.

        This result stays as it is. A 4-bit model is dequantised and becomes one of 16 bits. The
        copy is compared with the trained model on held-out prompts; what comes out is printed and
        stands in the folder's card.

        Args:
            folder: a new or empty one; model, tokenizer, options and a card.
            dtype: of the weights; None keeps theirs, and takes bfloat16 for quantised ones.

        Raises:
            FileExistsError: the folder holds something.
            TypeError, ValueError: there is no adapter, it can't be merged, or it gives NaN in this
                dtype; nothing is changed.
        """
        target = None if folder is None else Path(folder)
        if target is not None and target.is_dir() and not is_empty(target):
            raise FileExistsError(f"folder: {target} isn't empty; name a new one")
        if not (dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point)):
            raise TypeError(f"dtype: wanted a floating torch.dtype or None, got {dtype!r}")
        merged = merged_copy(self._adapted("merging"), dtype)
        ids = [
            prompt_ids(self.tokenizer, prompt, conversational=self.conversational)
            for prompt in self.held_out_prompts
        ]
        found = agreement(self.model, merged, ids)
        if found is not None and not math.isfinite(found.kl):
            raise ValueError(
                f"dtype: in {merged.dtype} the merged model gives NaN, which the trained one "
                "doesn't; torch.bfloat16 reaches as far as float32"
            )
        say("Merged" if found is None else f"Merged: {found}")
        if target is not None:
            merged.name_or_path = merged.config._name_or_path = str(target)
            self._write(target, merged, model_card(self, merged=str(found or "Not compared.")))
        return merged

    def push_to_hub(self, repo_id: str, *, private: bool = True, token: str | None = None) -> str:
        """Upload what `save` writes to a hub repository, made private unless told; its address."""
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi(token=token)
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            self.save(folder)
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
        target = page.write_report(self.output_dir / "run.html" if path is None else path, whole)
        say(f"Report: {target}")
        return target
