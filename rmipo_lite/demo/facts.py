"""The facts behind the demo's questions: small tables (`assets/words.json`) and programs.

Every fact carries its right answer and a few plausible wrong ones, so that the task can make
questions, training text, preference pairs and the true reward from one place.
"""

import itertools
import json
import random
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase

_WORDS = json.loads((Path(__file__).parent / "assets" / "words.json").read_text(encoding="utf-8"))
PHRASINGS: dict[str, list[str]] = _WORDS["phrasings"]  # of each kind of question, three
ANSWERS: dict[str, list[str]] = _WORDS["answers"]  # ways to give a terse answer of that kind
GENERIC = tuple(_WORDS["generic"])  # answers that say nothing
FILLERS = tuple(_WORDS["fillers"])  # sentences of a wordy answer
KINDS = tuple(PHRASINGS)


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing the model can know.

    `group` ties together facts that give each other away (hot-cold and cold-hot), so that a split
    by group holds both out.
    """

    kind: str
    group: str
    subject: tuple[str, ...]
    answer: str
    wrong: tuple[str, ...]


def _others(values: list[str], answer: str, rng: random.Random, count: int = 4) -> tuple[str, ...]:
    """`count` values that are not the answer, without repetition."""
    return tuple(rng.sample(sorted(set(values) - {answer}), count))


def _word_facts(rng: random.Random) -> list[Fact]:
    facts = []
    words = [word for pair in _WORDS["opposites"] for word in pair]
    for first, second in _WORDS["opposites"]:
        for word, answer in ((first, second), (second, first)):
            wrong = tuple(w for w in _others(words, answer, rng, 5) if w != word)[:4]
            facts.append(Fact("opposite", first, (word,), answer, wrong))
    classes = _WORDS["nouns"]
    forms = [plural for nouns in classes.values() for _, plural in nouns]
    for name, nouns in classes.items():
        others = tuple(other for other in classes if other != name)
        for noun, plural in nouns:
            facts.append(Fact("plural", noun, (noun,), plural, _others(forms, plural, rng)))
            article = "an " if noun[0] in "aeiou" else "a "
            facts.append(Fact("class", noun, (article + noun,), name, others))
    names = [colour for _, colour in _WORDS["colours"]]
    for thing, colour in _WORDS["colours"]:
        facts.append(Fact("colour", thing, (thing,), colour, _others(names, colour, rng)))
    for sequence in (list(ascii_lowercase), _WORDS["days"]):
        for index, name in enumerate(sequence):
            answer = sequence[(index + 1) % len(sequence)]
            facts.append(Fact("next", name, (name,), answer, _others(sequence, answer, rng)))
    return facts


def _number_facts() -> list[Fact]:
    facts = []
    for a in range(1, 10):
        for b in range(1, 10):
            group, subject = f"{min(a, b)},{max(a, b)}", (str(a), str(b))
            near = sorted({a + b + d for d in (-2, -1, 1, 2)} - {0, 1})
            wrong = tuple(str(number) for number in near)
            if max(a, b) < 9:
                facts.append(Fact("sum", group, subject, str(a + b), wrong))
            if a != b:
                facts.append(Fact("larger", group, subject, str(max(a, b)), (str(min(a, b)),)))
    return facts


def _letter_facts() -> list[Fact]:
    facts = []
    for letters in itertools.permutations("abcdef", 3):
        text = " ".join(letters)
        permutations = {" ".join(order) for order in itertools.permutations(letters)}
        for kind, right in (("sort", sorted(letters)), ("reverse", list(reversed(letters)))):
            answer = " ".join(right)
            facts.append(Fact(kind, text, (text,), answer, tuple(sorted(permutations - {answer}))))
        others = (letters[0], letters[1])
        facts.append(Fact("last", text, (text,), letters[2], others))
    return facts


def all_facts() -> list[Fact]:
    """Every fact of the task, always in the same order, without repeated questions."""
    rng = random.Random(20)
    facts = _word_facts(rng) + _number_facts() + _letter_facts()
    return list({(fact.kind, fact.subject): fact for fact in facts}.values())
