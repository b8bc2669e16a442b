"""The demo's task: short questions, a true reward that a program computes, and preference pairs.

The supervised model is mediocre on purpose: its training text mixes right, wrong, generic and wordy
answers to the same questions, so it knows more than it says and preferences have something to lift.
Held-out questions ask about facts that stand in no pair, in words that stand in no training text.
"""

import random
import re
from dataclasses import dataclass

from rmipo_lite.demo.facts import FILLERS, GENERIC, KINDS, LEAD_INS, PHRASINGS, Fact, all_facts

PAIR_KINDS = ("right/wrong", "specific/generic", "terse/wordy")
# Shares of the kinds of answer in the supervised text: what the model does before the preferences.
ANSWER_SHARES = {"right": 0.36, "wrong": 0.14, "generic": 0.26, "wordy": 0.24}

REWARD_RIGHT = 1.0
REWARD_GENERIC = 0.0
REWARD_WRONG = -0.5
WORDS_FREE = 8  # a terse answer has at most this many words
PENALTY_PER_WORD = 0.05
PENALTY_WORDY_MAX = 0.5
PENALTY_UNENDED = 0.5

HELD_OUT_SHARE = 0.3  # of the groups of facts of each kind
HELD_OUT_PER_KIND = 36  # prompts at most, so that no kind rules the mean


@dataclass(frozen=True, slots=True)
class Question:
    """A fact asked in one of its phrasings."""

    fact: Fact
    text: str


@dataclass(frozen=True, slots=True)
class Pair:
    """One preference pair; `kind` is one of `PAIR_KINDS`."""

    question: Question
    chosen: str
    rejected: str
    kind: str


def right_answer(fact: Fact) -> str:
    """The terse right answer."""
    return f"{LEAD_INS[fact.kind]}{fact.answer}."


def wrong_answer(fact: Fact, rng: random.Random) -> str:
    """A terse answer that is plausible and wrong."""
    return f"{LEAD_INS[fact.kind]}{rng.choice(fact.wrong)}."


def wordy_answer(fact: Fact, rng: random.Random) -> str:
    """The right answer after two or three sentences that say nothing."""
    return " ".join([*rng.sample(FILLERS, rng.randint(2, 3)), right_answer(fact)])


def read_answer(text: str) -> str:
    """What the last sentence of `text` states, without its lead-in: 'The sum is 7.' -> '7'."""
    sentences = [s.strip() for s in text.strip().split(".") if s.strip()]
    if not sentences:
        return ""
    last = " ".join(sentences[-1].lower().split())
    return re.sub(r"^.*\b(?:is|are)\s+", "", last)


def true_reward(question: Question, text: str, ended: bool = True) -> float:
    """Reward of the generated text alone: no model, no pair and no probability enters it.

    Right +1, generic 0, anything else -0.5; minus 0.05 for every word over eight (0.5 at most);
    minus 0.5 if the answer did not end by itself (`ended`) within the tokens it was given.
    """
    plain = " ".join(text.split())
    if any(plain.endswith(generic) for generic in GENERIC):
        reward = REWARD_GENERIC
    else:
        right = read_answer(plain) == question.fact.answer.lower()
        reward = REWARD_RIGHT if right else REWARD_WRONG
    extra_words = max(0, len(plain.split()) - WORDS_FREE)
    reward -= min(PENALTY_WORDY_MAX, PENALTY_PER_WORD * extra_words)
    return reward if ended else reward - PENALTY_UNENDED


def split_facts() -> tuple[list[Fact], list[Fact]]:
    """(facts for pairs, held-out facts), split by group; the same split in every process."""
    rng = random.Random(7)
    kept: list[Fact] = []
    held: list[Fact] = []
    for kind in KINDS:
        facts = [fact for fact in all_facts() if fact.kind == kind]
        groups = sorted({fact.group for fact in facts})
        held_groups = set(rng.sample(groups, round(HELD_OUT_SHARE * len(groups))))
        kept += [fact for fact in facts if fact.group not in held_groups]
        held += [fact for fact in facts if fact.group in held_groups]
    return kept, held


def ask(fact: Fact, phrasing: int) -> Question:
    """The question about a fact in one of its three phrasings."""
    return Question(fact, PHRASINGS[fact.kind][phrasing].format(*fact.subject))


def held_out_questions() -> list[Question]:
    """The evaluation prompts: facts in no pair, each in the one phrasing no training text has."""
    rng = random.Random(8)
    by_kind: dict[str, list[Question]] = {kind: [] for kind in KINDS}
    for index, fact in enumerate(split_facts()[1]):
        by_kind[fact.kind].append(ask(fact, index % 3))
    chosen = []
    for questions in by_kind.values():
        chosen += rng.sample(questions, min(HELD_OUT_PER_KIND, len(questions)))
    return chosen


def make_pairs(count: int, seed: int = 0) -> list[Pair]:
    """`count` pairs: half right against wrong, the rest specific/generic and terse/wordy evenly.

    Question kinds take turns, so that those with few facts weigh as much as those with many.
    """
    rng = random.Random(seed)
    kept = split_facts()[0]
    by_kind = {kind: [fact for fact in kept if fact.kind == kind] for kind in KINDS}
    pairs: dict[tuple[str, str], Pair] = {}  # by question and rejected answer: no pair twice
    while len(pairs) < count:
        fact = rng.choice(by_kind[KINDS[len(pairs) % len(KINDS)]])
        question = ask(fact, rng.randrange(3))
        kind = rng.choices(PAIR_KINDS, (0.5, 0.25, 0.25))[0]
        rejected = {
            "right/wrong": wrong_answer(fact, rng),
            "specific/generic": rng.choice(GENERIC),
            "terse/wordy": wordy_answer(fact, rng),
        }[kind]
        pairs[question.text, rejected] = Pair(question, right_answer(fact), rejected, kind)
    return list(pairs.values())
