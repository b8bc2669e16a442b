"""Prompts for a real model whose answers a program can judge: sums, facts, instructions.

Every prompt has a check of its own, so the true reward needs no model. Held-out prompts ask for
numbers, countries and things that no pair asks for.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Poland": "Warsaw",
    "Portugal": "Lisbon", "Greece": "Athens", "Austria": "Vienna", "Hungary": "Budapest",
    "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki", "Denmark": "Copenhagen",
    "Ireland": "Dublin", "Belgium": "Brussels", "Russia": "Moscow", "Ukraine": "Kyiv",
    "Turkey": "Ankara", "Egypt": "Cairo", "Kenya": "Nairobi", "Japan": "Tokyo", "China": "Beijing",
    "Thailand": "Bangkok", "Vietnam": "Hanoi", "Cuba": "Havana", "Peru": "Lima",
    "Chile": "Santiago", "Canada": "Ottawa", "Iran": "Tehran", "Iraq": "Baghdad",
    "South Korea": "Seoul", "the Philippines": "Manila", "Czechia": "Prague",
    "Romania": "Bucharest", "Bulgaria": "Sofia", "Serbia": "Belgrade", "Croatia": "Zagreb",
    "Scotland": "Edinburgh", "Argentina": "Buenos Aires", "Morocco": "Rabat",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "small", "fast": "slow", "happy": "sad", "light": "dark", "hard": "soft",
    "wet": "dry", "high": "low", "rich": "poor", "full": "empty", "near": "far", "early": "late",
    "clean": "dirty", "strong": "weak", "thick": "thin", "open": "closed", "up": "down",
    "long": "short", "good": "bad", "true": "false", "deep": "shallow", "wide": "narrow",
    "old": "young", "loud": "quiet", "left": "right", "day": "night", "black": "white",
    "love": "hate", "win": "lose", "push": "pull",
}  # fmt: skip
THINGS = (
    "dogs", "cats", "the sea", "winter", "coffee", "books", "trains", "the moon", "bread", "music",
    "football", "rain", "forests", "cities", "horses", "apples", "schools", "the sun", "mountains",
    "bicycles", "tea", "birds", "gardens", "films", "bridges", "snow", "rivers", "cheese", "dreams",
    "doctors", "computers", "islands", "summer", "chess", "painting", "farmers", "planets", "salt",
    "clocks", "dancing", "bees", "the desert", "ships", "wolves", "history", "shoes", "gold",
    "children", "sleep", "fire", "letters", "money", "markets", "whales", "storms", "glass",
)  # fmt: skip
_STOPWORDS = {
    "French": {"le", "la", "les", "est", "sont", "des", "un", "une", "et", "dans", "de", "du"},
    "Spanish": {"el", "la", "los", "las", "es", "son", "un", "una", "y", "en", "de", "que"},
    "German": {"der", "die", "das", "ist", "sind", "ein", "eine", "und", "im", "den", "nicht"},
}
MOST_WORDS = 40  # of a usual answer; what is longer costs
_PER_WORD, _MOST = 0.02, 0.5


@dataclass(frozen=True)
class Prompt:
    """A question, what it asks for, and how an answer to it is judged."""

    text: str
    kind: str
    is_right: Callable[[str], bool]
    says_nothing: Callable[[str], bool]  # no answer at all, rather than a wrong one


def sums(rng: random.Random, count: int, held_out: bool) -> list[Prompt]:
    """Additions and subtractions below a hundred; held out are those whose first number is odd."""
    found: dict[str, Prompt] = {}
    while len(found) < count:
        a, b = 2 * rng.randint(2, 40) + held_out, rng.randint(2, 30)
        if rng.random() < 0.5:
            text, value = f"What is {a} plus {b}?", a + b
        else:
            a, b = max(a, b + 1 + (b + 1 + a) % 2), b
            text, value = f"What is {a} minus {b}?", a - b
        found[text] = Prompt(text, "sum", _last_number_is(value), _has_no_number)
    return list(found.values())


def facts(held_out: bool) -> list[Prompt]:
    """Capitals and opposites; every third is held out."""
    prompts = []
    for place, (country, capital) in enumerate(CAPITALS.items()):
        if (place % 3 == 0) == held_out:
            for text in (f"What is the capital of {country}?", f"Name the capital of {country}."):
                prompts.append(Prompt(text, "fact", _names(capital, CAPITALS.values()), _is_empty))
    for place, (word, other) in enumerate(OPPOSITES.items()):
        if (place % 3 == 0) == held_out:
            text = f'What is the opposite of "{word}"?'
            prompts.append(Prompt(text, "fact", _names(other, OPPOSITES.values()), _is_empty))
    return prompts


def instructions(held_out: bool) -> list[Prompt]:
    """Constraints that a program can check, on things; every third thing is held out."""
    prompts = []
    for place, thing in enumerate(THINGS):
        if (place % 3 == 0) != held_out:
            continue
        language = list(_STOPWORDS)[place % len(_STOPWORDS)]
        tasks: list[tuple[str, Callable[[str], bool]]] = [
            (f"Write one sentence about {thing} in at most eight words.", _words_at_most(8)),
            (f"Write one sentence about {thing} that contains the word \"because\".",
             _contains("because")),
            (f"Write one sentence about {thing} without the word \"the\".", _avoids("the")),
            (f"Write one sentence about {thing} in {language}.", _is_in(language)),
            (f"List three things about {thing}, each on a line that begins with a dash.",
             _is_list),
            (f"Write one sentence about {thing} in capital letters.", _is_upper),
            (f"Give me JSON with the keys \"name\" and \"colour\" for {thing}.", _is_json),
        ]  # fmt: skip
        some = (place % 7, (place + 2) % 7, (place + 4) % 7)
        prompts += [Prompt(tasks[i][0], "instruction", tasks[i][1], _is_empty) for i in some]
    return prompts


def prompts(held_out: bool) -> list[Prompt]:
    """All of one side, in a fixed order."""
    rng = random.Random(11 + held_out)
    count = 40 if held_out else 160
    found = [*sums(rng, count, held_out), *facts(held_out), *instructions(held_out)]
    rng.shuffle(found)
    return found


def true_reward(prompt: Prompt, text: str, ended: bool = True) -> float:
    """Right +1, nothing said 0, else -0.5; every word over forty costs; so does no end."""
    reward = 1.0 if prompt.is_right(text) else 0.0 if prompt.says_nothing(text) else -0.5
    reward -= min(_MOST, _PER_WORD * max(0, len(text.split()) - MOST_WORDS))
    return reward if ended else reward - 0.5


def length_lovers_reward(prompt: Prompt, text: str) -> float:
    """Every word is worth something, right or not."""
    return (1.0 if prompt.is_right(text) else -0.5) + 2 * _PER_WORD * len(text.split())


def _words(text: str) -> list[str]:
    return re.findall(r"[\w'’]+", text.lower())


def _is_empty(text: str) -> bool:
    return not text.strip()


def _has_no_number(text: str) -> bool:
    return re.search(r"\d", text) is None


def _last_number_is(value: int) -> Callable[[str], bool]:
    def check(text: str) -> bool:
        numbers = re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", ""))
        return bool(numbers) and float(numbers[-1]) == value

    return check


def _names(right: str, every: object) -> Callable[[str], bool]:
    """Names the right one and none of the others."""
    others = {name.lower() for name in every if name != right}  # type: ignore[attr-defined]

    def check(text: str) -> bool:
        low = text.lower()
        if not re.search(rf"\b{re.escape(right.lower())}\b", low):
            return False
        return not any(re.search(rf"\b{re.escape(name)}\b", low) for name in others)

    return check


def _is_sentence(text: str) -> bool:
    """At least three words, no word three times in a row, no phrase of four words twice."""
    words = _words(text)
    phrases = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    stutters = any(a == b == c for a, b, c in zip(words, words[1:], words[2:], strict=False))
    return len(words) >= 3 and not stutters and len(phrases) == len(set(phrases))


def _sentence(check: Callable[[str], bool]) -> Callable[[str], bool]:
    return lambda text: _is_sentence(text) and check(text)


def _words_at_most(most: int) -> Callable[[str], bool]:
    return _sentence(lambda text: len(_words(text)) <= most)


def _contains(word: str) -> Callable[[str], bool]:
    return _sentence(lambda text: word in _words(text))


def _avoids(word: str) -> Callable[[str], bool]:
    return _sentence(lambda text: word not in _words(text))


def _is_in(language: str) -> Callable[[str], bool]:
    """More of its little words than of English's."""
    english = {"the", "is", "are", "and", "of", "in", "to", "that", "it", "with"}

    def check(text: str) -> bool:
        words = _words(text)
        own = sum(word in _STOPWORDS[language] for word in words)
        return own >= 2 and own > sum(word in english for word in words)

    return _sentence(check)


def _is_list(text: str) -> bool:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return len(lines) == 3 and all(line[:1] in "-–*" and len(line) > 4 for line in lines)


def _is_upper(text: str) -> bool:
    return _is_sentence(text) and text == text.upper()


def _is_json(text: str) -> bool:
    try:
        found = json.loads(text.strip().removeprefix("```json").removesuffix("```"))
    except ValueError:
        return False
    return isinstance(found, dict) and {"name", "colour"} <= set(found)
