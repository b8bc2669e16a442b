from __future__ import annotations

import pytest

from rmipo_lite.planning.cards import CARDS, COMMON, find_card


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("RTX 3060 12GB", "RTX 3060 12GB"), ("3060", "RTX 3060 12GB"), ("rtx4090", "RTX 4090 24GB"),
        ("3060 ti", "RTX 3060 Ti 8GB"), ("Tesla T4", "T4 16GB"), ("a100-40gb", "A100 40GB"),
        ("NVIDIA H100 80GB HBM3", "H100 80GB"), ("NVIDIA GeForce RTX 3090", "RTX 3090 24GB"),
        ("Tesla V100-SXM2-32GB", "V100 32GB"), ("Apple M2 Max", "M2 Max 32GB"),
        ("NVIDIA GeForce RTX 4070 Laptop GPU", "RTX 4070 Laptop 8GB"), ("h200", "H200 141GB"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "RTX 4070 Ti Super 16GB"),
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
    assert (card.name, card.memory, card.half) == ("12 GB card", 12 * 2**30, None)


@pytest.mark.parametrize(
    ("text", "speed"),
    [
        ("24GB 165TFLOPS 1TB/s", (24, 165.0, 82.5, 1000.0)),
        ("8 gb 30.5 tflops", (8, 30.5, 15.25, None)),
        ("16GiB, 50 TFLOPS, 900 GB/s", (16, 50.0, 25.0, 900.0)),
        ("12GB 504GB/s", (12, None, None, 504.0)),
    ],
)  # fmt: skip
def test_a_card_by_its_numbers(text: str, speed: tuple[float | None, ...]) -> None:
    card = find_card(text)
    assert (card.memory / 2**30, card.half, card.single, card.bandwidth) == speed


def test_a_name_that_is_made_with_several_memories_is_told_apart_by_the_card_that_is_there() -> (
    None
):
    assert find_card("NVIDIA GeForce RTX 3080", memory=12 * 2**30 - 10**8).name == "RTX 3080 12GB"
    assert find_card("NVIDIA GeForce RTX 3080", memory=10 * 2**30 - 10**8).name == "RTX 3080 10GB"


def test_an_apple_chip_takes_a_part_of_any_memory() -> None:
    small, large = find_card("M2 Max"), find_card("M2 Max 96GB")
    assert (small.memory, large.memory) == (32 * 2**30 * 2 // 3, 72 * 2**30)
    assert (large.name, large.half, large.kind) == ("M2 Max 96GB", small.half, "mps")


def test_speed_is_what_is_sustained_and_its_source_is_named() -> None:
    t4, others = find_card("T4"), [find_card(name) for name in ("RTX 3060 12GB", "RTX 4070 12GB")]
    assert all(t4.half < card.half for card in others)  # type: ignore[operator]
    for card in CARDS:
        assert card.source
        assert card.half
        assert card.single
        assert card.bandwidth
        assert card.single <= card.half


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
