"""Check 37: the usual mistakes, each answered in a sentence that says where and what to do."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from huggingface_hub import constants

import rmipo_lite
from rmipo_lite.config import RMiPOConfig
from rmipo_lite.ops import linear_logps, rmipo_loss
from rmipo_lite.training.trainer import RMiPOTrainer
from tests.kit import tiny_model, word_level, word_rows, word_tokenizer
from tests.trials.data.bad_rows import said_as_chat
from tests.trials.scorecard import Check, Lost, Trials, expect

_LONGEST = 480  # characters of a message: two sentences and a path
_PACKAGE = str(Path(rmipo_lite.__file__).parent)


@dataclass(frozen=True)
class Desk:
    """Where a mistake is made.

    Attributes:
        folder: empty but for `pairs.jsonl`.
        shared: holds `model` (with a tokenizer) and `bare` (a model without one).
    """

    folder: Path
    shared: Path

    def train(self, model: Any = None, dataset: Any = None, **options: Any) -> Any:
        """A right call of train(), but for what is given."""
        settings = {
            "tokenizer": word_tokenizer(), "output_dir": self.folder / "run", "use_cpu": True,
            "max_steps": 1, "disable_tqdm": True, **options,
        }  # fmt: skip
        dataset = word_rows(12) if dataset is None else dataset
        return rmipo_lite.train(tiny_model() if model is None else model, dataset, **settings)

    def config(self, **options: Any) -> RMiPOConfig:
        """Right options, but for what is given."""
        settings = {"use_cpu": True, "max_steps": 1, "disable_tqdm": True, **options}
        return RMiPOConfig(str(self.folder / "run"), **settings)

    def trainer(self, **changes: Any) -> RMiPOTrainer:
        """A right trainer, but for what is given."""
        settings = {
            "model": tiny_model(), "args": self.config(), "train_dataset": word_rows(12),
            "processing_class": word_tokenizer(), **changes,
        }  # fmt: skip
        return RMiPOTrainer(**settings)

    def command(self, *words: str) -> None:
        """A command line; its complaint is raised."""
        from rmipo_lite.cli.main import main

        out = io.StringIO()
        with contextlib.redirect_stderr(out):
            code = main(list(words))
        lines = [line for line in out.getvalue().splitlines() if line.startswith("rmipo-lite: ")]
        if code:
            raise SystemExit("\n".join(lines))

    def __truediv__(self, name: str) -> str:
        return str((self.shared if name in ("model", "bare") else self.folder) / name)


@dataclass(frozen=True)
class Mistake:
    """What is done, and words that the message must have: the place, and the next step."""

    what: str
    do: Callable[[Desk], Any]
    words: tuple[str, ...]


def _chats() -> list[dict[str, Any]]:
    return [{side: said_as_chat(row, side) for side in row} for row in word_rows(12)]


def _other_names() -> list[dict[str, str]]:
    return [{"question": row["prompt"], "good": row["chosen"], "bad": "w5"} for row in word_rows(3)]


def _without(token: str) -> Any:
    tokenizer = word_tokenizer()
    setattr(tokenizer, token, None)
    return tokenizer


def _lora(**options: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(**options)


def _plain_arguments(desk: Desk) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(desk / "run", use_cpu=True)


def _head(**changes: Any) -> Any:
    right = {"hidden": torch.ones(2, 4), "weight": torch.ones(5, 4)}
    return linear_logps(**{**right, "target_ids": torch.tensor([1, 2]), **changes})


def _uneven_pairs() -> Any:
    return rmipo_loss(*(torch.ones(count) for count in (3, 2, 3, 3)))


def _unknown_words() -> Any:
    words = [f"w{number}" for number in range(500)]
    rows = [{"prompt": "w5", "chosen": f"w{400 + n} w450", "rejected": "w6"} for n in range(8)]
    return {"processing_class": word_level(words), "train_dataset": rows}


_NO_PREFIX = (
    "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %} w9 {% endif %}"
)
MISTAKES = (
    Mistake("other column names", lambda d: d.train(dataset=_other_names()),
            ("dataset: columns found", "'question'", "rename_columns")),
    Mistake("a file that isn't there", lambda d: d.train(dataset=d / "none.jsonl"),
            ("dataset", "none.jsonl", "no file or folder", "a path, a hub name")),
    Mistake("a number as dataset", lambda d: d.train(dataset=7),
            ("dataset", "got int", "a list of dicts")),
    Mistake("one row as dataset", lambda d: d.train(dataset=word_rows(1)[0]),
            ("dataset", "[row]")),
    Mistake("no rows", lambda d: d.train(dataset=[]), ("dataset", "no rows", "at least one pair")),
    Mistake("no answers", lambda d: d.train(dataset=[{**r, "chosen": 3} for r in word_rows(9)]),
            ("dataset", "9 rows (0, 1, 2, 3, 4, ...)", "chosen: wanted text", "got a number")),
    Mistake("messages without a template", lambda d: d.train(dataset=_chats()),
            ("chat_template", "no template", 'chat_template="plain"')),
    Mistake("a template's name", lambda d: d.train(dataset=_chats(), chat_template="chatml"),
            ("chat_template", "'chatml'", "'plain' or a Jinja text")),
    Mistake("a template cut short",
            lambda d: d.train(dataset=_chats(), chat_template="{% for m in messages %}"),
            ("chat_template: line 1", "endfor")),
    Mistake("a template that changes the prompt",
            lambda d: d.train(dataset=_chats(), chat_template=_NO_PREFIX),
            ("12 rows", "prompt: wanted a chat template that writes it the same before an answer")),
    Mistake("an evaluation set of other columns",
            lambda d: d.train(eval_dataset=_other_names()),
            ("eval_dataset: columns found", "'question'", "rename_columns")),
    Mistake("an evaluation set that isn't there", lambda d: d.train(eval_dataset="none.jsonl"),
            ("eval_dataset", "none.jsonl", "no file or folder")),
    Mistake("a model that isn't there", lambda d: d.train("./none/model"),
            ("model", "no folder './none/model'", "a hub name")),
    Mistake("a hub name without the network", lambda d: d.train("nobody-has/this-model"),
            ("model", "nobody-has/this-model", "a folder, or a hub name")),
    Mistake("a number as model", lambda d: d.train(7), ("model", "a name or folder", "got int")),
    Mistake("model and dataset swapped",
            lambda d: rmipo_lite.train(word_rows(9), tiny_model(), output_dir=d / "run"),  # type: ignore[arg-type]
            ("model", "a name or folder", "got list")),
    Mistake("a folder without a tokenizer", lambda d: d.train(d / "bare", tokenizer=None),
            ("tokenizer", "bare", "Pass one: tokenizer=")),
    Mistake("a model made in memory, no tokenizer", lambda d: d.train(tokenizer=None),
            ("tokenizer", "made in memory", "pass one (tokenizer=")),
    Mistake("a tokenizer's name", lambda d: d.train(tokenizer=d / "model"),
            ("tokenizer", "AutoTokenizer.from_pretrained", "got str")),
    Mistake("a tokenizer without end token", lambda d: d.train(tokenizer=_without("eos_token")),
            ("tokenizer", "eos_token", "set tokenizer.eos_token")),
    Mistake("a prior behind a BOS that isn't there",
            lambda d: d.train(tokenizer=_without("bos_token"), prior_context="bos"),
            ("prior_context='bos'", "use prior_context='none'")),
    Mistake("another run's folder", lambda d: d.train(output_dir=d.folder),
            ("output_dir", "isn't empty", "resume=True")),
    Mistake("resume with nothing to resume", lambda d: d.train(resume=True),
            ("no valid checkpoint in", "run", "resume=False")),
    Mistake("an option misspelt", lambda d: d.train(learnig_rate=1e-4),
            ("learnig_rate", "did you mean learning_rate?")),
    Mistake("an option of other packages", lambda d: d.train(epochs=3),
            ("epochs", "did you mean num_train_epochs?")),
    Mistake("quantization of a loaded model", lambda d: d.train(quantization="4bit"),
            ("quantization", "given by name or folder", "this one is loaded")),
    Mistake("an adapter's name misspelt", lambda d: d.train(peft_config="lora"),
            ("peft_config", "'auto', 'new', None", "'lora'")),
    Mistake("adapter layers that aren't there",
            lambda d: d.train(peft_config=_lora(target_modules=["query"])),
            ("peft_config", "query", "are called", "q_proj")),
    Mistake("beta=0", lambda d: d.config(beta=0), ("beta", "a number > 0", "got 0")),
    Mistake("margins the wrong way round", lambda d: d.config(gamma_min=2.0),
            ("gamma_min", "at most gamma_max", "2.0")),
    Mistake("another method's loss", lambda d: d.config(loss_type="sigmoid"),
            ("loss_type", "dpo (trl", "name one")),
    Mistake("max_length=1", lambda d: d.train(max_length=1), ("max_length", "at least 2", "got 1")),
    Mistake("a number as text", lambda d: d.config(max_length="1024"),
            ("max_length", "a whole number", "'1024'")),
    Mistake("options in a dict", lambda d: d.trainer(args={"beta": 2}),
            ("args", "RMiPOConfig", "got dict")),
    Mistake("transformers' own options", lambda d: d.trainer(args=_plain_arguments(d)),
            ("args", "RMiPOConfig", "got TrainingArguments")),
    Mistake("another model's tokenizer", lambda d: d.trainer(**_unknown_words()),
            ("tokenizer", "vocabulary", "row")),
    Mistake("whole numbers as hidden states",
            lambda d: _head(hidden=torch.ones(2, 4, dtype=torch.int64)),
            ("linear_logps: hidden", "float32", "int64")),
    Mistake("a target outside the vocabulary",
            lambda d: _head(target_ids=torch.tensor([1, 5])),
            ("linear_logps: target_ids", "0 to 4", "got 5")),
    Mistake("sides of different length", lambda d: _uneven_pairs(),
            ("rmipo_loss: rejected_logps", "(3,)", "got (2,)")),
    Mistake("a command's option misspelt",
            lambda d: d.command("train", d / "model", d / "pairs.jsonl", "--learnig_rate", "1"),
            ("--learnig_rate", "did you mean --learning_rate?")),
)  # fmt: skip


def mistakes(trials: Trials) -> None:
    """Each mistake is told in one or two sentences of our own, with place and next step."""
    # What is looked for on a hub is not there, without waiting for a network.
    with mock.patch.object(constants, "HF_HUB_OFFLINE", True):
        for name in ("model", "bare"):
            tiny_model().save_pretrained(trials.folder / name)
        word_tokenizer().save_pretrained(trials.folder / "model")
        for trial in trials:
            with trial:
                mistake = MISTAKES[trial.index]
                trial.tried = mistake.what
                _one(Desk(trial.folder, trials.folder), mistake)


def _one(desk: Desk, mistake: Mistake) -> None:
    lines = [json.dumps(row) + "\n" for row in word_rows(12)]
    (desk.folder / "pairs.jsonl").write_text("".join(lines))
    try:
        mistake.do(desk)
    except (Exception, SystemExit) as error:
        message = str(error)
        source = _raised_in(error)
    else:
        raise Lost("nothing was said")
    for word in mistake.words:
        expect(word in message, f"{word!r} is not in the message: {message[:400]}")
    expect(len(message) <= _LONGEST, f"{len(message)} characters: {message[:400]}")
    expect("Traceback" not in message, f"a traceback: {message[:400]}")
    ours = source.startswith(_PACKAGE) or message.startswith("rmipo-lite: ")
    expect(ours, f"it is {source} that says: {message[:400]}")


def _raised_in(error: BaseException) -> str:
    """The file whose words the message is."""
    frames = error.__traceback__
    file = ""
    while frames is not None:
        file = frames.tb_frame.f_code.co_filename
        frames = frames.tb_next
    return file


CHECKS = [
    Check(37, "40 usual mistakes: place and next step in a sentence", len(MISTAKES), mistakes,
          least=len(MISTAKES)),
]  # fmt: skip
