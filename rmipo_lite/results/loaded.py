"""`load_run(folder)`: a run's folder, or any adapter's, as a model that answers and merges."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor

from rmipo_lite.checkpoints.weights import CONFIG_FILE, save_weights
from rmipo_lite.config import RMiPOConfig
from rmipo_lite.model.generation import Answer, Prompt
from rmipo_lite.model.loading import load_tokenizer
from rmipo_lite.model.names import short_name
from rmipo_lite.options.method import MethodFields
from rmipo_lite.output.console import printable, say
from rmipo_lite.output.figures import Figures
from rmipo_lite.planning.quantization import Quantization, load_for_run
from rmipo_lite.results.comparison import AnswerComparison
from rmipo_lite.results.conversation import Conversation
from rmipo_lite.results.figures import figures_of
from rmipo_lite.results.judged import JudgedModel
from rmipo_lite.results.model_card import CARD_FILE, card_of_merged
from rmipo_lite.results.run_file import read_numbers
from rmipo_lite.results.trained import FACTS_FILE
from rmipo_lite.system.files import read_object
from rmipo_lite.tokens.templates import prepare_tokenizer

_OF_ROWS = (
    "max_length", "max_prompt_length", "truncation_mode", "tokenization", "chat_template",
)  # fmt: skip


@dataclass(repr=False)
class LoadedRun(JudgedModel):
    """What a run left in its folder: it generates, compares and merges as a `TrainResult` does.

    Attributes:
        folder: where it is from.
        model, tokenizer: loaded; an adapter with its base model, ready to train on.
        conversational: whether a text is one user turn, rendered by the chat template.
        args: the options of the run, as far as they say what it trained and how it read rows.
    """

    folder: Path
    model: Any
    tokenizer: Any
    conversational: bool
    args: RMiPOConfig
    start: dict[str, Tensor] | None = None
    went_on: bool = False
    held_out_prompts: list[Prompt] = field(default_factory=list)
    held_out_chosen: list[str | None] = field(default_factory=list)
    _samples: AnswerComparison | None = field(default=None, init=False)
    _conversation: Conversation | None = field(default=None, init=False)
    _kept: dict[str, list[Answer]] = field(default_factory=dict, init=False)

    def __repr__(self) -> str:
        what = "an adapter" if isinstance(self.model, PeftModel) else "a whole model"
        return printable(f"LoadedRun({short_name(str(self.folder))}: {what})")

    def figures(self) -> Figures:
        """The paper's figures from the numbers in the run's folder, as `TrainResult.figures`.

        Raises:
            FileNotFoundError, ValueError: the folder has none, or damaged ones.
        """
        return figures_of(read_numbers(self.folder))

    def _write_run(self, model: Any, folder: Path) -> None:
        save_weights(model, folder)
        self.tokenizer.save_pretrained(folder)
        if (self.folder / CONFIG_FILE).is_file():
            shutil.copyfile(self.folder / CONFIG_FILE, folder / CONFIG_FILE)

    def _merged_card(self, how: str) -> str:
        card = self.folder / CARD_FILE
        return card_of_merged(card.read_text(encoding="utf-8") if card.is_file() else "", how)


def load_run(
    folder: str | Path,
    *,
    quantization: Quantization = "auto",
    conversational: bool | None = None,
    **config: Any,
) -> LoadedRun:
    """Load what a run left: `load_run("my-run").compare(["What is 2 + 2?"])`.

    Args:
        folder: of a run, a checkpoint, or any adapter or model, also a hub name.
        quantization: as for `train`.
        conversational: whether a text is one user turn, rendered by the chat template; None takes
            what the run was, and of a folder that doesn't tell, whether there is a template.
        **config: options of `RMiPOConfig` that say how a model is loaded: `bf16`, `use_cpu`.

    Raises:
        ValueError, FileNotFoundError: there is no such model, or it can't be loaded.
    """
    name = str(folder)
    args = RMiPOConfig("rmipo-load", **(_options_of(Path(name)) | config))
    tokenizer = prepare_tokenizer(load_tokenizer(name), None)
    if conversational is None:
        conversational = _was_conversational(Path(name), tokenizer)
    went_on = bool(_facts(Path(name)).get("went_on"))
    model = load_for_run(name, args, quantization)
    return LoadedRun(Path(name), model.eval(), tokenizer, conversational, args, went_on=went_on)


def _options_of(folder: Path) -> dict[str, Any]:
    """What the run's own options say of its method and of how rows become tokens."""
    said = read_object(folder / CONFIG_FILE)
    names = [*MethodFields.__dataclass_fields__, *_OF_ROWS]
    return {name: said[name] for name in names if name in said}


def _was_conversational(folder: Path, tokenizer: Any) -> bool:
    facts = _facts(folder)
    if "conversational" in facts:
        return bool(facts["conversational"])
    if tokenizer.chat_template:
        say(f"{folder.name} doesn't say how it was asked: texts go through its chat template")
    return bool(tokenizer.chat_template)


def _facts(folder: Path) -> dict[str, Any]:
    """What a run's folder says of it; of a checkpoint, the folder that it lies in."""
    own = read_object(folder / FACTS_FILE)
    return own or (
        read_object(folder.parent / FACTS_FILE) if folder.name.startswith("checkpoint-") else {}
    )
