from __future__ import annotations

import pytest

from rmipo_lite.planning.cards import CARDS, COMMON, find_card


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("RTX 3060 12GB", "RTX 3060 12GB"), ("3060", "RTX 3060 12GB"), ("rtx4090", "RTX 4090 24GB"),
        ("3060 ti", "RTX 3060 Ti 8GB"), ("Tesla T4", "T4 16GB"), ("a100-40gb", "A100 40GB"),
        ("NVIDIA H100 80GB HBM3", "H100 80GB"), ("NVIDIA GeForce RTX 3090", "RTX 3090 24GB"),
    ],
)  # fmt: skip
def test_names_are_read_forgivingly(name: str, found: str) -> None:
    assert find_card(name).name == found


def test_every_card_is_found_by_its_name_and_common_ones_are_cards() -> None:
    for card in CARDS:
        assert find_card(card.name) is card
    assert {find_card(name).name for name in COMMON} == set(COMMON)
    sizes = {card.memory / 2**30 for card in map(find_card, COMMON)}
    assert (min(sizes), max(sizes)) == (8, 80)


@pytest.mark.parametrize("size", ["12GB", "12", 12, 12.0, "12 GiB"])
def test_a_memory_stands_for_a_card_of_unknown_speed(size: str | float) -> None:
    card = find_card(size)
    assert (card.name, card.memory, card.tflops) == ("12 GB card", 12 * 2**30, None)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("A100", "is made as A100 40GB, A100 80GB; name one"),
        ("RTX 3060 8GB", "no card is known as 'RTX 3060 8GB'. Nearest: RTX 3060 12GB"),
        ("potato", "no card is known as 'potato'. Wanted a card's name"),
        ("", "no card is known as ''"),
        ("4091", "Nearest: RTX 4090 24GB"),
    ],
)
def test_unknown_cards_are_told_with_the_nearest(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=r"^gpu: ") as caught:
        find_card(name)
    assert words in str(caught.value)


def test_bf16_is_in_hardware_from_ampere_on() -> None:
    has = {card.name for card in CARDS if card.has_bf16}
    assert "T4 16GB" not in has
    assert {"RTX 3060 12GB", "RTX 5090 32GB"} <= has
