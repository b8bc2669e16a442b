"""The facts behind the demo's questions: small tables and programs, the same in every process.

Every fact carries its right answer and a few plausible wrong ones, so that the task can make
questions, training text, preference pairs and the true reward from one place.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

OPPOSITES = (
    "hot cold,big small,fast slow,old young,happy sad,light dark,hard soft,wet dry,high low,"
    "rich poor,full empty,near far,loud quiet,early late,clean dirty,strong weak,thick thin,"
    "open closed,right left,up down,long short,good bad,sweet bitter,rough smooth,true false,"
    "deep shallow,wide narrow,first last,alive dead,brave afraid"
)
PLURALS = (
    "cow cows,dog dogs,cat cats,horse horses,mouse mice,goose geese,sheep sheep,fox foxes,"
    "wolf wolves,bee bees,fish fish,duck ducks,apple apples,pear pears,cherry cherries,"
    "tomato tomatoes,egg eggs,cake cakes,bean beans,loaf loaves,berry berries,peach peaches,"
    "potato potatoes,bun buns,knife knives,box boxes,chair chairs,brush brushes,table tables,"
    "lamp lamps,clock clocks,key keys,watch watches,shelf shelves,bottle bottles,pen pens"
)
NOUN_CLASSES = ("an animal", "a food", "a thing")  # of PLURALS, twelve nouns each, in this order
COLOURS = (
    "grass green,snow white,coal black,blood red,the sky blue,the sun yellow,a lemon yellow,"
    "a leaf green,a carrot orange,a pumpkin orange,milk white,salt white,a crow black,a ruby red,"
    "the sea blue,a frog green,a rose red,chocolate brown,mud brown,a banana yellow,a plum purple,"
    "a grape purple,a cloud white,tar black,an orange orange,a chick yellow,a brick red,"
    "a pea green,wood brown,a violet purple,a swan white,sand yellow,a bear brown,flour white,"
    "ink black,a jewel red"
)
DAYS = ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]
ALPHABET = "abcdefghijklmnopqrstuvwxyz"

PHRASINGS: dict[str, tuple[str, ...]] = {
    "sum": ("What is {0} + {1}?", "Add {0} and {1}.", "What is the sum of {0} and {1}?"),
    "opposite": (
        "What is the opposite of {0}?",
        "Give the opposite of {0}.",
        "Which word means the opposite of {0}?",
    ),
    "plural": (
        "What is the plural of {0}?",
        "Give the plural of {0}.",
        "One {0}, two what?",
    ),
    "colour": ("What colour is {0}?", "Tell me the colour of {0}.", "Which colour has {0}?"),
    "last": ("What is the last letter of {0}?", "Which letter ends {0}?", "How does {0} end?"),
    "sort": ("Sort the letters {0}.", "Put {0} in order.", "What is {0} in order?"),
    "reverse": ("Reverse {0}.", "Say {0} backwards.", "What is {0} backwards?"),
    "class": ("What kind of thing is {0}?", "What would you call {0}?", "Tell me what {0} is."),
    "next": ("What comes after {0}?", "Which one follows {0}?", "What is next after {0}?"),
    "larger": (
        "Which is larger, {0} or {1}?",
        "Which number is bigger, {0} or {1}?",
        "Tell me the larger of {0} and {1}.",
    ),
}
LEAD_INS = {
    "sum": "The sum is ",
    "opposite": "The opposite is ",
    "plural": "The plural is ",
    "colour": "The colour is ",
    "last": "The last is ",
    "sort": "In order it is ",
    "reverse": "Backwards it is ",
    "class": "It is ",
    "next": "Next is ",
    "larger": "The larger is ",
}
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


def _table(text: str) -> list[tuple[str, str]]:
    """Read 'a b,c d' into pairs, the last word of an entry being its value."""
    pairs = [entry.rsplit(" ", 1) for entry in text.split(",")]
    return [(key, value) for key, value in pairs]


def _others(values: list[str], answer: str, rng: random.Random, count: int = 4) -> tuple[str, ...]:
    """`count` values that are not the answer, without repetition."""
    return tuple(rng.sample(sorted(set(values) - {answer}), count))


def _word_facts(rng: random.Random) -> list[Fact]:
    facts = []
    opposites = _table(OPPOSITES)
    words = [word for pair in opposites for word in pair]
    for first, second in opposites:
        for word, answer in ((first, second), (second, first)):
            wrong = tuple(w for w in _others(words, answer, rng, 5) if w != word)[:4]
            facts.append(Fact("opposite", first, (word,), answer, wrong))
    plurals = _table(PLURALS)
    forms = [plural for _, plural in plurals]
    for index, (noun, plural) in enumerate(plurals):
        facts.append(Fact("plural", noun, (noun,), plural, _others(forms, plural, rng)))
        article = "an " if noun[0] in "aeiou" else "a "
        answer = NOUN_CLASSES[index // 12]
        wrong = tuple(name for name in NOUN_CLASSES if name != answer)
        facts.append(Fact("class", noun, (article + noun,), answer, wrong))
    colours = _table(COLOURS)
    names = [colour for _, colour in colours]
    for thing, colour in colours:
        facts.append(Fact("colour", thing, (thing,), colour, _others(names, colour, rng)))
    for sequence in (list(ALPHABET), DAYS):
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
