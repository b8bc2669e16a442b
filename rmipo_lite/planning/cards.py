"""Graphics cards that people train on: what of them decides whether a run fits, and how fast.

`cards.csv` has memory, the speed of products (10^12 operations a second, in 16 bits with float32
accumulation and in float32), memory bandwidth and second-level cache, and where the speed is from:
sustained as somebody measured it, or else the maker's data sheet. GeForce cards reach the sheet's
figure for float32 accumulation, half of the headline's; small server cards don't (a T4 at its 70 W
does 24 of its 65), and a laptop's depends on the watts its maker gives it.
"""

import csv
import difflib
import re
from dataclasses import dataclass, replace
from pathlib import Path

_GIB, _MIB = 2**30, 2**20
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:gb|gib|g)?", re.IGNORECASE)
_NUMBERS = re.compile(  # "24GB 165TFLOPS 1TB/s": the speeds may be left out
    r"(?P<size>\d+(?:\.\d+)?)\s*gi?b(?:[\s,]+(?P<speed>\d+(?:\.\d+)?)\s*tflops)?"
    r"(?:[\s,]+(?P<width>\d+(?:\.\d+)?)\s*(?P<unit>[tg])b/s)?",
    re.IGNORECASE,
)
_LARGEST_GB = 512  # of a memory that stands alone; more is a card's number
_DECORATION = re.compile(
    r"nvidia|geforce|tesla|quadro|apple|rtx|hbm\w*|pcie|sxm\d?|gpu|[^a-z0-9]", re.IGNORECASE
)
_SMALL_MAC = 36 * _GIB  # below it macOS lets the GPU take 2/3 of the memory, else 3/4


@dataclass(frozen=True)
class Card:
    """A card; of one that is known by its memory alone, speed is None.

    Attributes:
        memory: bytes that a process may take.
        half: products in 16 bits with float32 accumulation, 10^12 operations a second.
        single: products in float32, likewise.
        bandwidth: of its memory, 10^9 bytes a second.
        cache: second-level cache, bytes.
        capability: compute capability, as 8.6; of other makers' 8 where bfloat16 is in hardware.
        kind: torch's type of the device.
        source: where the speeds are from.
    """

    name: str
    memory: int
    half: float | None
    single: float | None
    bandwidth: float | None
    cache: int
    capability: float
    kind: str = "cuda"
    source: str = ""

    @property
    def has_bf16(self) -> bool:
        """Whether bfloat16 is in its hardware (Ampere and newer); older ones take fp16."""
        return self.capability >= 8


def _read() -> tuple[Card, ...]:
    with Path(__file__).with_suffix(".csv").open(encoding="utf-8", newline="") as file:
        return tuple(
            Card(
                row["name"], _usable(int(row["gib"]) * _GIB, row["kind"]), float(row["half"]),
                float(row["single"]), float(row["bandwidth"]),
                int(float(row["cache_mib"]) * _MIB), float(row["capability"]), row["kind"],
                row["source"],
            )
            for row in csv.DictReader(file)
        )  # fmt: skip


def _usable(memory: int, kind: str) -> int:
    """Bytes: an Apple GPU shares the system's memory, and is recommended to take a part of it."""
    if kind != "mps":
        return memory
    return memory * 2 // 3 if memory < _SMALL_MAC else memory * 3 // 4


CARDS = _read()  # a T4 has 15 GiB with its error correction on, as on Colab
COMMON = (
    "RTX 3070 8GB", "RTX 4060 8GB", "RTX 3080 10GB", "RTX 3060 12GB", "RTX 4070 12GB", "T4 16GB",
    "RTX 4060 Ti 16GB", "RTX 4080 16GB", "RTX 3090 24GB", "RTX 4090 24GB", "L4 24GB",
    "RTX 5090 32GB", "A100 40GB", "RTX A6000 48GB", "A100 80GB", "H100 80GB",
)  # fmt: skip


def _key(name: str) -> str:
    return _DECORATION.sub("", name.lower())


def _model(card: Card) -> str:
    """A card's name without its memory."""
    return card.name.rsplit(" ", 1)[0]


def find_card(name: str | float, memory: int | None = None) -> Card:
    """The card of a name ("RTX 3060 12GB", "T4", "M2 Max 64GB"), a memory ("12GB", 12) or numbers.

    Args:
        name: a name, a memory, or memory, speed in 16 bits and bandwidth: "24GB 165TFLOPS 1TB/s".
        memory: bytes of the card that is there, for a name that is made with several.

    Raises:
        ValueError: no card is called so; the message names the nearest, and where the memory is
            another the ones there are.
    """
    text = str(name).strip()
    key = _key(text)
    for found in (
        [card for card in CARDS if _key(card.name) == key],
        [card for card in CARDS if _key(_model(card)) == key],
    ):
        if len(found) == 1:
            return found[0]
        if found and memory is not None:
            return min(found, key=lambda card: abs(card.memory - memory))
        if found:
            raise ValueError(f"gpu: {text!r} is made as {_listed(found)}; name one")
    numbers = _of_numbers(text) or _mac(text)
    if numbers is not None:
        return numbers
    same = [card for card in CARDS if _key(_model(card)) and key.startswith(_key(_model(card)))]
    names = {_key(card.name): card for card in CARDS} | {_key(_model(card)): card for card in CARDS}
    near = same or [names[near] for near in difflib.get_close_matches(key, names, n=3, cutoff=0.5)]
    hint = f" Nearest: {_listed(near)}." if near else ""
    raise ValueError(
        f"gpu: no card is known as {text!r}.{hint} Wanted a card's name, a memory such as '12GB', "
        "memory, speed and bandwidth such as '24GB 165TFLOPS 1TB/s', or 'cpu'"
    )


def _of_numbers(text: str) -> Card | None:
    """A card by what it has: 16-bit speed and bandwidth where they are given."""
    found = _NUMBERS.fullmatch(text) or _SIZE.fullmatch(text)
    if found is None or not 1 <= float(found[1]) <= _LARGEST_GB:
        return None
    named = found.groupdict()
    half = float(named["speed"]) if named.get("speed") else None
    width = float(named["width"]) if named.get("width") else None
    if width is not None and named["unit"] in "tT":
        width *= 1000
    name = f"{float(found[1]):g} GB card"
    # Of GeForce cards from Ampere on, float32 products have half the speed.
    single = None if half is None else half / 2
    return Card(name, int(float(found[1]) * _GIB), half, single, width, 4 * _MIB, 8.6)


def _mac(text: str) -> Card | None:
    """An Apple chip with another memory than the table's."""
    head, _, size = text.rpartition(" ")
    number = _SIZE.fullmatch(size)
    for card in CARDS:
        if number and card.kind == "mps" and _key(_model(card)) == _key(head):
            memory = _usable(int(float(number[1]) * _GIB), card.kind)
            return replace(card, name=f"{_model(card)} {float(number[1]):g}GB", memory=memory)
    return None


def _listed(cards: list[Card]) -> str:
    return ", ".join(dict.fromkeys(card.name for card in cards))
