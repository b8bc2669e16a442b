"""The demo's task: short questions, a true reward that a program computes, and preference pairs.

The supervised model is mediocre on purpose: its training text mixes right, wrong, generic and wordy
answers to the same questions, each in one of four wordings, so it knows more than it says and
preferences have something to lift. Held-out questions ask about facts that stand in no pair, in
words that stand in no training text.
"""

import itertools
import random
from dataclasses import dataclass
from functools import cache

from rmipo_lite.demo.facts import ANSWERS, FILLERS, GENERIC, KINDS, PHRASINGS, Fact, all_facts

PAIR_KINDS = ("right/wrong", "specific/generic", "terse/wordy")
# Shares of the kinds of answer in the supervised text: what the model does before the preferences.
ANSWER_SHARES = {"right": 0.44, "wrong": 0.1, "generic": 0.46}
WORDY_SHARE = 0.4  # of the answers of every kind: length tells nothing of what they say

# What an answer says. Garbled is what no sentence of the task is: a broken word, a sentence twice.
REWARDS = {"right": 1.0, "generic": 0.0, "wrong": -0.5, "garbled": -1.0}
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


def right_answer(fact: Fact, rng: random.Random) -> str:
    """A terse right answer in one of its wordings."""
    return rng.choice(ANSWERS[fact.kind]).format(fact.answer)


def wrong_answer(fact: Fact, rng: random.Random) -> str:
    """A terse answer that is plausible and wrong."""
    return rng.choice(ANSWERS[fact.kind]).format(rng.choice(fact.wrong))


def wordy(answer: str, rng: random.Random) -> str:
    """The answer after one to three sentences that say nothing."""
    return " ".join([*rng.sample(FILLERS, rng.randint(1, 3)), answer])


_VALUES = {value.lower() for fact in all_facts() for value in (fact.answer, *fact.wrong)}
_VALUES |= {" ".join(letters) for letters in itertools.product("abcdef", repeat=3)}
_WORDINGS = {tuple(text.split("{0}")) for texts in ANSWERS.values() for text in texts}


def what_it_says(fact: Fact, text: str) -> str:
    """Of an answer to a question about `fact`: one of `REWARDS`, sentences that say nothing apart.

    An answer is a sentence of the task word for word; whose value is no value of any fact, and
    anything around it but the task's own fillers, each at most once, makes it garbled.
    """
    plain = " ".join(text.split())
    fillers = list(FILLERS)
    while found := next((filler for filler in fillers if plain.startswith(filler)), None):
        fillers.remove(found)
        plain = plain.removeprefix(found).strip()
    if plain in GENERIC:
        return "generic"
    values = {
        plain.removeprefix(before).removesuffix(after).lower()
        for before, after in _WORDINGS
        if plain.startswith(before) and plain.endswith(after)
    }
    if fact.answer.lower() in values:
        return "right"
    return "wrong" if values & _VALUES else "garbled"


def true_reward(question: Question, text: str, ended: bool = True) -> float:
    """Reward of the generated text alone: no model, no pair and no probability enters it.

    `REWARDS` of what it says; minus 0.05 for every word over eight (0.5 at most); minus 0.5 if the
    answer did not end by itself (`ended`) within the tokens it was given.
    """
    extra_words = max(0, len(text.split()) - WORDS_FREE)
    reward = REWARDS[what_it_says(question.fact, text)]
    reward -= min(PENALTY_WORDY_MAX, PENALTY_PER_WORD * extra_words)
    return reward if ended else reward - PENALTY_UNENDED


def length_lovers_reward(question: Question, text: str) -> float:
    """What an annotator goes by who likes length: every word is worth as much as it should cost."""
    return REWARDS[what_it_says(question.fact, text)] + PENALTY_PER_WORD * len(text.split())


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


@cache
def questions_by_text() -> dict[str, Question]:
    """Every question of the task, in each of its phrasings."""
    facts = [fact for part in split_facts() for fact in part]
    asked = [ask(fact, phrasing) for fact in facts for phrasing in range(3)]
    return {question.text: question for question in asked}


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

    Right and wrong come in one wording, so that nothing but what they say tells them apart.
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
        wording = rng.choice(ANSWERS[fact.kind])
        rejected = {
            "right/wrong": wording.format(rng.choice(fact.wrong)),
            "specific/generic": rng.choice(GENERIC),
            "terse/wordy": wordy(right_answer(fact, rng), rng),
        }[kind]
        chosen = wording.format(fact.answer)
        pairs[question.text, rejected] = Pair(question, chosen, rejected, kind)
    return list(pairs.values())
