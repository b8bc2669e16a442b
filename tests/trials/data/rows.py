"""Check 3: malformed rows among good ones."""

from __future__ import annotations

import re
from typing import Any

import torch

from rmipo_lite.data.report import DataReport
from rmipo_lite.data.rows import load_rows
from rmipo_lite.step import pair_values
from rmipo_lite.step.pair_step import PairStep
from rmipo_lite.tokens.options import TokenizationOptions
from rmipo_lite.tokens.pair import TokenizedPair
from rmipo_lite.tokens.tokenize_rows import tokenize_rows
from tests.kit import byte_level, tiny_model, tiny_trainer, word_rows, word_tokenizer
from tests.trials.data.bad_rows import KINDS, MAX_LENGTH, Bad, Record
from tests.trials.scorecard import Check, Trial, Trials, expect

_GOOD_ROWS = 6
_OPTIONS = TokenizationOptions(max_length=MAX_LENGTH)
# What a reason must say: which columns, what was wanted, what came.
_REASON = re.compile(
    r"(row|tools|prompt|chosen|rejected|chosen and rejected|prompt, chosen, rejected)"
    r": wanted .+, got .+"
)

# Columns as other people call them, and what each must be renamed to; None where it stays.
SCHEMAS: tuple[dict[str, str], ...] = (
    {"question": "prompt", "good": "chosen", "bad": "rejected"},
    {"instruction": "prompt", "preferred": "chosen", "dispreferred": "rejected"},
    {"input": "prompt", "winner": "chosen", "loser": "rejected"},
    {"query": "prompt", "response_j": "chosen", "response_k": "rejected"},
    {"x": "prompt", "yw": "chosen", "yl": "rejected"},
    {"problem": "prompt", "correct": "chosen", "incorrect": "rejected"},
    {"prompt": "prompt", "chosen_response": "chosen", "rejected_response": "rejected"},
    {"prompt": "prompt", "non_preferred": "rejected", "preferred": "chosen"},
    {"prompt": "prompt", "incorrect_answer": "rejected", "correct_answer": "chosen"},
    {"userPrompt": "prompt", "betterAnswer": "chosen", "worseAnswer": "rejected"},
    {"Prompt": "prompt", "Chosen": "chosen", "Rejected": "rejected"},
    {"prompt": "prompt", "choosen": "chosen", "rejectd": "rejected"},
    {"human": "prompt", "accept": "chosen", "reject": "rejected"},
    {"context": "prompt", "positive": "chosen", "negative": "rejected"},
)


def malformed_rows(trials: Trials) -> None:
    """One bad row among good ones, or the whole dataset under other names."""
    step = tiny_trainer(trials.folder / "trainer", model=_byte_model()).pair_step
    clean = {form: _clean(rows, tokenizer) for form, (rows, tokenizer) in _forms().items()}
    for trial in trials:
        with trial:
            form = trial.rng.choice(list(clean))
            kind = trial.index % (len(KINDS) + 1)
            if kind == len(KINDS):
                _other_names(trial, _forms()[form][0])
            else:
                bad = KINDS[kind](trial.rng, trial.rng.choice(_forms()[form][0]))
                _one_bad_row(trial, form, bad, clean[form], step)


def _byte_model() -> Any:
    return tiny_model(vocab_size=len(byte_level()))


def _forms() -> dict[str, tuple[list[Record], Any]]:
    """Good rows as text and as messages, each with a tokenizer; the first row of all is odd."""
    texts: list[Record] = list(word_rows(_GOOD_ROWS))
    chats: list[Record] = [
        {
            side: [{"role": "user" if side == "prompt" else "assistant", "content": row[side]}]
            for side in row
        }
        for row in texts
    ]
    return {
        "texts": (texts, byte_level()),
        "messages": (chats, byte_level()),
        "words": (texts, word_tokenizer()),
    }


def _tokenized(rows: Any, tokenizer: Any) -> tuple[list[TokenizedPair], DataReport]:
    kept, report = load_rows(rows)
    return tokenize_rows(kept, tokenizer, _OPTIONS, report), report


def _ids(pair: TokenizedPair) -> tuple[list[int], list[int], list[int]]:
    return pair.prompt_ids, pair.chosen_ids, pair.rejected_ids


def _clean(rows: list[Record], tokenizer: Any) -> list[tuple[list[int], list[int], list[int]]]:
    pairs, _ = _tokenized(rows, tokenizer)
    return [_ids(pair) for pair in pairs]


def _one_bad_row(trial: Trial, form: str, bad: Bad, clean: list[Any], step: PairStep) -> None:
    rows, tokenizer = _forms()[form]
    place = trial.rng.randrange(len(rows) + 1)
    trial.tried = f"{bad.what}, row {place} among good {form}"
    records = [*rows[:place], bad.record, *rows[place:]]
    container = trial.rng.choice((list, tuple, iter))
    pairs, report = _tokenized(container(records), tokenizer)
    report.check()
    expect(report.total == len(records), f"{report.total} rows counted of {len(records)}")
    expect(report.kept == len(pairs), f"{report.kept} kept, and {len(pairs)} pairs")
    others = [_ids(pair) for pair in pairs if pair.row != place]
    expect(others == clean, "the good rows have other tokens than without the bad one")
    if form == "words" and bad.needs_template:  # which that tokenizer has not
        bad = Bad(bad.what, bad.record, "refused", "prompt")
    _expect_fate(bad, place, pairs, report)
    if trial.index % 30 == 0:
        values = pair_values.concat([values for _, values in step.evaluate(pairs)])
        numbers = torch.stack([values.loss, values.gamma, values.pmi_gap])
        expect(
            pair_values.finite_pairs(values).all() and numbers.isfinite().all(),
            "a number isn't finite",
        )


def _expect_fate(bad: Bad, place: int, pairs: list[TokenizedPair], report: DataReport) -> None:
    tallies = {"dropped": report.dropped, "refused": report.refused}
    found = [(fate, *item) for fate, reasons in tallies.items() for item in reasons.items()]
    if bad.fate == "kept":
        expect(not found, f"not kept: {found}")
        expect(any(pair.row == place for pair in pairs), "neither kept nor counted")
        return
    expect(len(found) == 1, f"wanted it {bad.fate}, got {found or 'it kept'}")
    ((fate, reason, tally),) = found
    expect(fate == bad.fate, f"wanted it {bad.fate}, got it {fate}: {reason}")
    expect(_REASON.fullmatch(reason), f"not column, wanted and got: {reason}")
    expect(reason.startswith(f"{bad.columns}: "), f"wanted {bad.columns} named, got: {reason}")
    expect(tally.rows == [place], f"the row was not named, but {tally.rows}")
    text = str(report)
    expect(f"(rows {place})" in text and len(text) < 3000, f"printed: {text[:300]}")


def _other_names(trial: Trial, rows: list[Record]) -> None:
    """Every row under other column names: refused as a whole, with the rename in one line."""
    schema = trial.rng.choice(SCHEMAS)
    trial.tried = f"columns {list(schema)}"
    renamed = [{name: row[column] for name, column in schema.items()} for row in rows]
    try:
        load_rows(renamed)
    except ValueError as error:
        message = str(error)
    else:
        message = "nothing was said"
    for name, column in schema.items():
        if name != column:
            expect(f'"{name}": "{column}"' in message, f"{name} -> {column} isn't told: {message}")
    expect("rename_columns" in message and "\n" not in message, f"no hint in one line: {message}")


CHECKS = [
    Check(3, "malformed rows among good ones: counted, named, harmless", 1000, malformed_rows),
]  # fmt: skip
