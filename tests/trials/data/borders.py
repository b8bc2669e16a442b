"""Checks 8, 11: where prompt and response meet, how they begin and end."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from rmipo_lite.data.report import DataReport
from rmipo_lite.data.rows import load_rows
from rmipo_lite.model import batch
from rmipo_lite.tokens.options import TokenizationOptions
from rmipo_lite.tokens.pair import TokenizedPair
from rmipo_lite.tokens.tokenize_rows import tokenize_rows
from tests.kit import (
    BOS,
    BOS_ID,
    EOS,
    EOS_ID,
    UNKNOWN_ID,
    byte_level,
    sentencepiece_like,
    word_level,
)
from tests.trials.scorecard import Check, Trial, Trials, expect

Record = dict[str, Any]
WORDS = [f"w{number}" for number in range(4, 90)]


def tokenized(
    rows: list[Record], tokenizer: Any, **options: Any
) -> tuple[list[TokenizedPair], DataReport]:
    """Pairs and report of some rows, all of them accounted for."""
    kept, report = load_rows(rows)
    pairs = tokenize_rows(kept, tokenizer, TokenizationOptions(**options), report)
    report.check()
    return pairs, report


def _chat(row: Record) -> Record:
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return {side: [{"role": role, "content": row[side]}] for side, role in roles.items()}


# ---- 8: the border --------------------------------------------------------------------------

# Runs of these make a text: tokens merge inside and across them, and a border can fall anywhere.
_RUNS = (
    "the abc's", " the", "price is $46 as of 12", "  ", "    ", "\n", "\n\n", "\t", "\r\n", "::",
    ":", "...", "e\u0301\u0323", "\u0301", "\U0001f469\u200d\U0001f469\u200d\U0001f467", "\u200d",
    "\U0001f1eb\U0001f1f7", "你好羅馬", "こんにちは", "مرحبا", "שלום", "\u202e", "\x00", "\ufffd",
    "éé", "ß", "ﬁ", "<", "|end|", "\u00a0", "\U0010ffff", "</", "a\u0327",
)  # fmt: skip


def borders(trials: Trials) -> None:
    """A text cut at random places: one prompt for both sides, and nothing lost where they join."""
    for trial in trials:
        with trial:
            kind = trial.index % 3
            if kind == 2:
                _words_at_border(trial)
            else:
                name = trial.rng.choice(("bpe", "unigram"))
                _text_at_border(trial, byte_level() if kind == 0 else sentencepiece_like(name))


def _text_at_border(trial: Trial, tokenizer: Any) -> None:
    # A letter first: sentencepiece itself forgets a space at the beginning of all text.
    prompt, chosen = _cut(trial.rng, "x" + _text(trial.rng))
    rejected = trial.rng.choice((chosen[:1], "")) + _text(trial.rng) + "."
    row = {"prompt": prompt, "chosen": chosen + "x", "rejected": rejected}
    chat = tokenizer.chat_template is not None and trial.rng.random() < 0.3
    trial.tried = f"{'messages' if chat else 'texts'} {row!r}"
    # A second row with the same prompt and other answers: its prompt must have the same tokens.
    rows = [row, {**row, "chosen": "!" + rejected, "rejected": "?"}]
    first, second = tokenized([_chat(r) if chat else r for r in rows], tokenizer)[0]
    expect(first.rejected_prompt_ids is None, "the two sides have prompts of their own")
    expect(first.prompt_ids == second.prompt_ids, "the prompt's tokens hang on the answer")
    head = f"{BOS}<|user|>{prompt}<|end|><|assistant|>" if chat else prompt
    for ids, answer in ((first.chosen_ids, row["chosen"]), (first.rejected_ids, row["rejected"])):
        expect(ids[-1] == tokenizer.eos_token_id, "no end token")
        text = tokenizer.decode(first.prompt_ids + ids[:-1])
        expect(text == head + answer, f"the joined tokens say {text!r}")


def _text(rng: random.Random) -> str:
    return "".join(rng.choices(_RUNS, k=rng.randint(1, 12)))


def _cut(rng: random.Random, text: str) -> tuple[str, str]:
    """Two parts of a text, the first not empty."""
    at = rng.randint(1, len(text))
    return text[:at], text[at:]


def _words_at_border(trial: Trial) -> None:
    """Word by word: a word that the border cuts in two is what its halves are."""
    tokenizer = word_level(WORDS, adds_bos=trial.rng.random() < 0.5)
    spaces = trial.rng.choices((" ", "\n", "\t ", "\u3000"), k=20)
    words = trial.rng.choices(WORDS, k=trial.rng.randint(1, 19))
    text = "".join(word + space for word, space in zip(words, spaces, strict=False))
    prompt, chosen = _cut(trial.rng, text)
    row = {"prompt": prompt, "chosen": chosen + " w9", "rejected": "w8 w7"}
    trial.tried = f"words {row!r}"
    ((pair,), _) = tokenized([row], tokenizer)
    start = [BOS_ID] if len(tokenizer("w9")["input_ids"]) == 2 else []
    expect(pair.prompt_ids == start + _word_ids(prompt), f"prompt {pair.prompt_ids}")
    expect(pair.chosen_ids == [*_word_ids(row["chosen"]), EOS_ID], f"chosen {pair.chosen_ids}")
    expect(pair.rejected_ids == [*_word_ids(row["rejected"]), EOS_ID], f"{pair.rejected_ids}")


def _word_ids(text: str) -> list[int]:
    known = {word: number for number, word in enumerate(WORDS, UNKNOWN_ID + 1)}
    return [known.get(word, UNKNOWN_ID) for word in text.split()]


# ---- 11: BOS and EOS ------------------------------------------------------------------------


@dataclass(frozen=True)
class SetUp:
    """A tokenizer's habits.

    Attributes:
        template_bos: what the chat template begins with.
        rows: whether the rows are messages, which the template renders, or texts.
        bos: how many BOS the prompt must have.
    """

    name: str
    special: dict[str, Any]
    template_bos: str
    chat: bool
    bos: int


_NO_BOS = {"bos_token": None}
SET_UPS = (
    SetUp("nobody adds BOS", {}, "", True, 0),
    SetUp("the tokenizer adds BOS", {"adds_bos": True}, "", True, 1),
    SetUp("the template adds BOS", {}, "{{ bos_token }} ", True, 1),
    SetUp("both add BOS", {"adds_bos": True}, "{{ bos_token }} ", True, 1),
    SetUp("there is no BOS", _NO_BOS, "{{ bos_token or '' }} ", True, 0),
    SetUp("texts, the tokenizer adds BOS", {"adds_bos": True}, "", False, 1),
)
_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}EOS{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
_CENSUS = len(SET_UPS) * 2 * 2
_TRUNCATED_TO = 12  # tokens


def census(trials: Trials) -> None:
    """BOS and EOS counted, with templates that end a turn and others, pad token and EOS alike."""
    for trial in trials:
        with trial:
            # By 7, which has no factor in common with 24: a tenth of the trials is mixed well.
            place = trial.index * 7 % _CENSUS
            set_up, place = SET_UPS[place % len(SET_UPS)], place // len(SET_UPS)
            _count(trial, set_up, template_eos=bool(place % 2), truncated=bool(place // 2))


def _count(trial: Trial, set_up: SetUp, *, template_eos: bool, truncated: bool) -> None:
    pad = trial.rng.choice(("<pad>", EOS))
    trial.tried = (
        f"{set_up.name}, EOS {'in' if template_eos else 'not in'} the template, pad token {pad}, "
        f"{'truncated' if truncated else 'whole'}"
    )
    tokenizer = word_level([*WORDS, "user", "assistant"], pad_token=pad, **set_up.special)
    end = f" {EOS}" if template_eos else ""
    tokenizer.chat_template = set_up.template_bos + _TEMPLATE.replace("EOS", end)
    texts = [" ".join(trial.rng.choices(WORDS, k=30 if truncated else 3)) for _ in range(3)]
    row = dict(zip(("prompt", "chosen", "rejected"), texts, strict=True))
    max_length = _TRUNCATED_TO if truncated else 64
    rows = [_chat(row) if set_up.chat else row]
    ((pair,), report) = tokenized(rows, tokenizer, max_length=max_length)
    expect(pair.prompt_ids.count(BOS_ID) == set_up.bos, f"prompt {pair.prompt_ids}")
    expect(pair.prompt_ids[:1] == [BOS_ID] or not set_up.bos, f"prompt {pair.prompt_ids}")
    expect(None not in pair.prompt_ids, f"prompt {pair.prompt_ids}")
    ends = 0 if truncated else 1
    for ids in (pair.chosen_ids, pair.rejected_ids):
        expect(BOS_ID not in ids, f"BOS in a response: {ids}")
        expect(ids.count(EOS_ID) == ends, f"{ids.count(EOS_ID)} end tokens: {ids}")
        expect((ids[-1] == EOS_ID) == bool(ends), f"the end token is not the last: {ids}")
    expect(report.truncated_responses == (2 if truncated else 0), "truncation miscounted")
    _expect_scored(pair, ends, tokenizer.pad_token_id)


def _expect_scored(pair: TokenizedPair, ends: int, pad_id: int) -> None:
    """The end tokens are targets of policy and prior, in both forms, whatever the pad token is."""
    for packing in (True, False):
        policy = batch.policy_input([pair], packing, pad_id)
        prior = batch.prior_input([pair], packing, (), pad_id)
        for name, inputs in (("policy", policy), ("prior", prior)):
            count = int((inputs.target_ids == EOS_ID).sum())
            expect(count == 2 * ends, f"{count} end tokens scored by the {name}, packed {packing}")
        scored = len(policy.target_ids), len(prior.target_ids)
        total = len(pair.chosen_ids) + len(pair.rejected_ids)
        expect(scored == (total, total - 2), f"{scored} tokens scored of {total}")


CHECKS = [
    Check(8, "prompt and response meet: any text, three tokenizers", 3000, borders),
    Check(11, "BOS and EOS counted over set-ups, truncated or not", _CENSUS, census,
          least=_CENSUS),
]  # fmt: skip
