"""Check 38: swapped labels and a bias to length are told before training, and nothing else is."""

from __future__ import annotations

import contextlib
import io
import random
from typing import Any

from transformers import AutoModelForCausalLM

import rmipo_lite
from rmipo_lite.demo.data import MODEL, message_row, swapped
from rmipo_lite.demo.task import make_pairs
from tests.kit import byte_level
from tests.trials.scorecard import Check, Trial, Trials, expect

Rows = list[dict[str, Any]]
_PAIRS = 40
_SWAPPED = "before any training the model finds the rejected side likelier"
_LENGTH = "the chosen response is longer in"
# Of clean pairs, in how many the chosen side is longer: with every honest mistake below added it is
# still no more than the package lets pass.
_CLEAN_SHARE = 0.4


def alarms(trials: Trials) -> None:
    """The demo's model knows right from wrong; what is done to its pairs must be noticed."""
    pairs = [pair for pair in make_pairs(1600) if pair.kind == "right/wrong"]
    rows = [message_row(pair.question.text, pair.chosen, pair.rejected) for pair in pairs]
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    for trial in trials:
        with trial:
            # A fourth each, and the other half clean.
            act = (_swapped, _biased, _clean, _clean)[trial.index % 4]
            act(trial, model, rows)


def _swapped(trial: Trial, model: Any, rows: Rows) -> None:
    share = trial.rng.uniform(0.75, 1.0)
    trial.tried = f"{share:.0%} of the pairs swapped"
    told = _told(trial, model, _swap(trial.rng, _balanced(trial.rng, rows), share))
    expect(_SWAPPED in told, f"no word of it: {told[-300:]}")
    expect("rename the columns" in told, "no way out is named")


def _biased(trial: Trial, model: Any, rows: Rows) -> None:
    share = trial.rng.uniform(0.7, 1.0)
    trial.tried = f"a longer chosen response in {share:.0%} of the pairs"
    chosen = _balanced(trial.rng, rows)
    told = _told(trial, model, _lengthen(trial.rng, chosen, share))
    expect(_LENGTH in told, f"no word of it: {told[-300:]}")


def _clean(trial: Trial, model: Any, rows: Rows) -> None:
    share = trial.rng.uniform(0.0, 0.2)  # of honest mistakes, as every dataset has them
    trial.tried = f"clean pairs, {share:.0%} of them swapped"
    told = _told(trial, model, _swap(trial.rng, _balanced(trial.rng, rows), share))
    for alarm in (_SWAPPED, _LENGTH):
        expect(alarm not in told, f"a false alarm: {told[told.find(alarm) :][:200]}")


def _told(trial: Trial, model: Any, rows: Rows) -> str:
    """What train() prints up to the end of its first step."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        rmipo_lite.train(
            model, rows, eval_dataset=rows, tokenizer=byte_level(), peft_config="new",
            output_dir=trial.folder / "run", max_steps=1, learning_rate=0.0, use_cpu=True,
            per_device_train_batch_size=2, max_length=256, disable_tqdm=True,
        )  # fmt: skip
    return out.getvalue()


# ---- pairs ----------------------------------------------------------------------------------


def _text(row: dict[str, Any], side: str) -> str:
    return str(row[side][0]["content"])


def _is_longer(row: dict[str, Any]) -> bool:
    sizes = [len(byte_level()(_text(row, side))["input_ids"]) for side in ("chosen", "rejected")]
    return sizes[0] > sizes[1]


def _balanced(rng: random.Random, rows: Rows) -> Rows:
    """Pairs in which the chosen side is longer in _CLEAN_SHARE of them."""
    drawn = rng.sample(rows, len(rows))
    longer = [row for row in drawn if _is_longer(row)][: int(_PAIRS * _CLEAN_SHARE)]
    others = [row for row in drawn if not _is_longer(row)][: _PAIRS - len(longer)]
    return rng.sample(longer + others, _PAIRS)


def _swap(rng: random.Random, rows: Rows, share: float) -> Rows:
    count = round(share * len(rows))
    return rng.sample([swapped(row) for row in rows[:count]] + rows[count:], len(rows))


def _lengthen(rng: random.Random, rows: Rows, share: float) -> Rows:
    """The share of the pairs, and no less, with more words on the chosen side."""
    count = round(share * len(rows))
    words = " ".join(["I had a close look at this for you."] * 3)
    longer = [
        {**row, "chosen": [{"role": "assistant", "content": f"{words} {_text(row, 'chosen')}"}]}
        for row in rows
    ]
    return rng.sample(longer[:count] + rows[count:], len(rows))


CHECKS = [
    Check(38, "alarms on swapped labels and length bias, none on clean", 20, alarms,
          least=6),
]  # fmt: skip
