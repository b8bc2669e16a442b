"""What can be done with a trained model, right after its run or from its folder.

It is the model itself and not a copy: before/after comparisons switch the adapter off and on, so
they cost no memory.
"""

from __future__ import annotations

import contextlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import PreTrainedModel

from rmipo_lite.adapters import start
from rmipo_lite.adapters.merge import merged_copy
from rmipo_lite.checkpoints.sealed_folder import files_put_in_place
from rmipo_lite.export.run import export
from rmipo_lite.model.generation import Answer, Prompt, generate_answers, prompt_ids, prompts_of
from rmipo_lite.model.loading import stored_dtype
from rmipo_lite.model.names import name_of
from rmipo_lite.output.console import say
from rmipo_lite.parallel.group import Group
from rmipo_lite.results.agreement import agreement
from rmipo_lite.results.comparison import AnswerComparison
from rmipo_lite.results.model_card import CARD_FILE
from rmipo_lite.system.files import is_empty
from rmipo_lite.version import __version__

FACTS_FILE = "run.json"


# What a merged copy is compared on where a run's folder holds no prompts.
_TEXTS: list[Prompt] = [
    "What is the capital of France?", "Write one sentence about the sea.", "Why is the sky blue?",
    "def add(a, b):", "List three animals, and say of each where it lives.",
]  # fmt: skip


class Trained(ABC):
    """A trained model that answers, compares itself with its start, and merges its adapter.

    Attributes:
        model, tokenizer: as they were trained.
        conversational: whether a text is one user turn, rendered by the chat template.
        start: the adapter's weights at step 0, by name; None where it is merely switched off.
        went_on: whether the run trained an adapter further that was there.
        held_out_prompts: what `compare` answers when given nothing.
    """

    _is_switched = False  # whether a `with` block of at_start or adapter_off is open

    model: Any
    tokenizer: Any
    conversational: bool
    start: dict[str, Tensor] | None
    went_on: bool
    held_out_prompts: list[Prompt]
    _samples: AnswerComparison | None

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
        with self._switched(), start.adapter_off(self._adapted("before/after")):
            yield self.model

    @contextlib.contextmanager
    def at_start(self) -> Iterator[Any]:
        """The model as it was at step 0, inside the `with` block.

        Raises:
            TypeError: there is no adapter to switch off, or none any more.
            ValueError: the run went on with an adapter that was there, and nobody kept how it was.
        """
        adapted = self._adapted("before/after")
        if self.start is None and self.went_on:
            raise ValueError(
                "model: this run went on with an adapter, and its folder doesn't hold how that was "
                "at step 0; load the folder it came from, or take adapter_off() for the base model"
            )
        with self._switched():
            if self.start is None:
                with start.adapter_off(adapted):
                    yield self.model
            else:
                with start.swapped(adapted, self.start):
                    yield self.model

    @contextlib.contextmanager
    def _switched(self) -> Iterator[None]:
        """Inside the block other weights are in force than the trained ones."""
        self._refuse_switched()
        self._is_switched = True
        try:
            yield
        finally:
            self._is_switched = False

    def _refuse_switched(self) -> None:
        """Raise ValueError inside a `with` of at_start or adapter_off."""
        if self._is_switched:
            raise ValueError(
                "model: inside at_start() or adapter_off() the trained weights aren't in force; "
                "ask after the `with` block"
            )

    def _adapted(self, what: str) -> PeftModel:
        is_adapted = isinstance(self.model, PeftModel)
        if not is_adapted and self.start is None:
            raise TypeError(
                f"model: {what} needs an adapter, and this model has none "
                f"({type(self.model).__name__} is a whole model)"
            )
        if not is_adapted or not any(
            isinstance(module, BaseTunerLayer) for module in self.model.modules()
        ):
            raise TypeError(
                f"model: {what} needs an adapter, and this one's was merged into the weights "
                "(merge_and_unload); what was before is gone. result.merge() leaves the model as "
                "it is and gives a copy"
            )
        return self.model

    def compare(
        self, prompts: Sequence[Prompt] | None = None, max_new_tokens: int = 128, **options: Any
    ) -> AnswerComparison:
        """Answers before and after training, side by side; printed or shown as a table.

        Args:
            prompts: as for `generate`; None takes `held_out_prompts`.
            max_new_tokens, **options: as for `generate`.

        Before is the model at step 0: of a new adapter the base model, of one that went on what it
        had learnt before. The last comparison is shown with the result and in its report.

        Raises:
            TypeError: the model has no adapter, or none any more.
            ValueError: there is no prompt.
        """
        self._refuse_switched()
        prompts = self.held_out_prompts if prompts is None else prompts_of(prompts)
        if not prompts:
            raise ValueError("prompts: none were given, and none held out here; pass some texts")
        with self.at_start():
            before = self.generate(prompts, max_new_tokens, **options)
        after = self.generate(prompts, max_new_tokens, **options)
        self._samples = AnswerComparison(list(prompts), before, after)
        return self._samples

    def merge(
        self, folder: str | Path | None = None, *, dtype: torch.dtype | None = None
    ) -> PreTrainedModel:
        """A copy of the model with the adapter's weights added in; saved where a folder is given.

        This result stays as it is. A 4-bit model is dequantised and becomes one of 16 bits. The
        copy is compared with the trained model on held-out prompts (on five of its own where the
        run's folder was loaded); what comes out is printed and stands in the folder's card.

        Args:
            folder: a new or empty one; model, tokenizer, options and a card.
            dtype: of the weights; None takes that of the base model's files, or keeps what the
                model made in memory has; bfloat16 for quantised ones.

        Raises:
            FileExistsError: the folder holds something.
            TypeError, ValueError: there is no adapter, it can't be merged, or it gives NaN in this
                dtype; nothing is changed.
        """
        self._refuse_switched()
        target = None if folder is None else Path(folder)
        is_first = Group.current().is_first  # of several processes, which writes
        if is_first and target is not None and target.is_dir() and not is_empty(target):
            raise FileExistsError(f"folder: {target} isn't empty; name a new one")
        if not (dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point)):
            raise TypeError(f"dtype: wanted a floating torch.dtype or None, got {dtype!r}")
        adapted = self._adapted("merging")
        merged = merged_copy(adapted, dtype, stored_dtype(name_of(adapted)))
        found = agreement(self.model, merged, self._compared_on())
        if found is not None and not math.isfinite(found.kl):
            raise ValueError(
                f"dtype: in {merged.dtype} the merged model gives NaN, which the trained one "
                "doesn't; torch.bfloat16 reaches as far as float32"
            )
        say("Merged" if found is None else f"Merged: {found}")
        if target is not None and is_first:
            merged.name_or_path = merged.config._name_or_path = str(target)
            self._write(target, merged, self._merged_card(str(found or "Not compared.")))
        return merged

    def export_gguf(
        self,
        path: str | Path,
        format: str = "f16",
        *,
        adapter_only: bool = False,
        modelfile: bool = False,
        check: bool = True,
    ) -> Path:
        """Write the model as a GGUF file, which llama.cpp, Ollama and LM Studio read.

        The adapter is merged in, this result stays as it is. Where llama.cpp is installed (extra
        [gguf]) the file is loaded there: texts must become the same tokens, conversations be
        rendered alike, and predictions be the trained model's; how far off they are is printed.
        An answer ends where it was taught to.

        Args:
            path: the new file.
            format: "f32", "f16", "bf16", "q8_0" or "q4_k_m".
            adapter_only: the adapter alone, float32, for use upon a file of the base model.
            modelfile: write Ollama's Modelfile beside it.
            check: whether to look at it in llama.cpp.

        Raises:
            ValueError: this model or tokenizer can't be exported, or llama.cpp makes something else
                of the file, which then isn't left behind.
            FileExistsError: there is such a file.
            ImportError: packages of the extra [gguf] are missing.
        """
        if not Group.current().is_first:
            return Path(path)  # of several processes the first writes
        self._refuse_switched()
        return export(
            self.model, self.tokenizer, path, format, self._compared_on(),
            adapter_only=adapter_only, modelfile=modelfile, check=check,
        )  # fmt: skip

    def _compared_on(self) -> list[list[int]]:
        """Ids of prompts on which another form of the model is compared with it."""
        return [
            prompt_ids(self.tokenizer, prompt, conversational=self.conversational)
            for prompt in self.held_out_prompts or _TEXTS
        ]

    def _write(self, target: Path, model: Any, card: str) -> Path:
        """All at once: a full disk or a kill leaves what was there before."""
        self._refuse_switched()
        facts = {
            "rmipo_lite": __version__, "conversational": self.conversational,
            "went_on": self.went_on,
        }  # fmt: skip
        with files_put_in_place(target) as staged:
            self._write_run(model, staged)
            (staged / CARD_FILE).write_text(card, encoding="utf-8")
            (staged / FACTS_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        return target

    @abstractmethod
    def _write_run(self, model: Any, folder: Path) -> None:
        """Weights, tokenizer and the run's options, as far as they are known."""

    @abstractmethod
    def _merged_card(self, how: str) -> str:
        """The card of the merged model; `how` says how far it is from the trained one."""
