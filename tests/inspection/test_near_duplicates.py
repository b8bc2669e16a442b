"""Near duplicates: what brute force finds, nothing that only shares its prompt, no explosion."""

from __future__ import annotations

import random
import time
from itertools import combinations

import pytest

from rmipo_lite.inspection.near_duplicates import near_duplicate_groups, similarity

Texts = tuple[str, str, str]


def words(rng: random.Random, count: int) -> str:
    return " ".join(f"w{rng.randrange(5000)}" for _ in range(count))


def perturbed(text: str, rng: random.Random, share: float) -> str:
    return " ".join(f"x{rng.randrange(99)}" if rng.random() < share else w for w in text.split(" "))


def groups(texts: list[Texts]) -> list[list[int]]:
    return near_duplicate_groups(len(texts), texts.__getitem__)


def shingles(text: str) -> set[tuple[str, ...]]:
    found = [*text.split(), "", ""]
    return set(zip(found, found[1:], found[2:], strict=False))


def jaccard(one: str, other: str) -> float:
    a, b = shingles(one), shingles(other)
    return len(a & b) / len(a | b)


def test_the_pairs_that_brute_force_finds() -> None:
    rng = random.Random(0)
    texts: list[Texts] = []
    for _ in range(60):
        base = tuple(words(rng, count) for count in (20, 40, 40))
        texts.append(base)
        for share in (0.01, 0.03, 0.06, 0.1):
            texts.append(tuple(perturbed(text, rng, share) for text in base))
    joined = [" ".join(pair) for pair in texts]
    answers = [" ".join(pair[1:]) for pair in texts]
    wanted = {
        (i, j)
        for i, j in combinations(range(len(texts)), 2)
        if jaccard(joined[i], joined[j]) >= 0.8 and jaccard(answers[i], answers[j]) >= 0.8
    }
    found = groups(texts)
    together = {pair for group in found for pair in combinations(group, 2)}
    assert len(wanted) > 40
    missed = wanted - together
    assert len(missed) <= 0.02 * len(wanted)
    # What is together is alike, if not directly then by way of others of the same group.
    assert all(
        any((min(i, j), max(i, j)) in wanted for j in group if j != i)
        for group in found
        for i in group
    )


def test_a_shared_prompt_is_no_duplicate() -> None:
    rng = random.Random(1)
    prompt = words(rng, 300)
    texts = [(prompt, words(rng, 8), words(rng, 8)) for _ in range(20)]
    assert jaccard(" ".join(texts[0]), " ".join(texts[1])) > 0.8
    assert groups(texts) == []


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("Say Hi!", "Hello there, you.", "no"), ("say hi", "hello there you", "No.")),
        (("q", "a", "b"), ("q", "a", "b")),
        (
            ("問い", "東京は日本の首都です" * 3, "いいえ"),
            ("問い", "東京は日本の首都です" * 3, "いえ"),
        ),
    ],
    ids=["case and punctuation", "one word each", "no spaces"],
)
def test_what_counts_as_the_same(one: Texts, other: Texts) -> None:
    assert groups([one, ("else", "entirely", "different"), other]) == [[0, 2]]


def test_texts_without_a_word_are_no_duplicates() -> None:
    assert groups([("?", "!", ":)")] * 3) == []
    assert groups([]) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["identical", "one number", "long shared part"])
def test_thousands_that_share_a_bucket_take_seconds(kind: str) -> None:
    """A step over all pairs of 4,000 rows would be 8 million comparisons."""
    rng = random.Random(2)
    base = words(rng, 120)
    texts: list[Texts] = {
        "identical": [(base, base, base)] * 4000,
        "one number": [(f"q {i}", f"{base} {i}", base[::-1]) for i in range(4000)],
        "long shared part": [(base, words(rng, 20), words(rng, 20)) for _ in range(4000)],
    }[kind]
    began = time.process_time()
    found = groups(texts)
    assert time.process_time() - began < 20
    assert [len(group) for group in found] == ([] if kind == "long shared part" else [4000])


@pytest.mark.parametrize(
    ("chosen", "rejected", "value"),
    [
        ("a b c d e f g h i j", "a b c d e f g h i x", 0.9),
        ("a b c d e f g h i j", "a b c d e f g h x y", None),
        ("one  two", "one two\n", 1.0),
        ("a b c d e f g h i j k", "a b c d e f g h i j", 20 / 21),
        ("a b c d e f g h i j", "j i h g f e d c b a", None),
        ("The sum is 7.", "The sum is 9.", None),
        ("", "", None),
    ],
)
def test_similarity(chosen: str, rejected: str, value: float | None) -> None:
    found = similarity(chosen, rejected)
    assert found == (value if value is None else pytest.approx(value))


def test_similarity_of_huge_texts_takes_no_square() -> None:
    rng = random.Random(3)
    middle = ["a", "b"] * 50_000
    other = middle.copy()
    rng.shuffle(other)
    began = time.process_time()
    assert similarity(" ".join(middle), " ".join(other)) is not None
    assert time.process_time() - began < 5
