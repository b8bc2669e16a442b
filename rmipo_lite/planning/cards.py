"""Graphics cards that people train on: what of them decides whether a run fits, and how fast.

From the makers' data sheets: memory, dense 16-bit tensor throughput with float32 accumulation (on
GeForce cards half of the headline figure), memory bandwidth, second-level cache. Peaks, not what a
run reaches.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

_GIB, _MIB = 2**30, 2**20
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:gb|gib|g)?", re.IGNORECASE)
_LARGEST_GB = 512  # of a memory that stands alone; more is a card's number
_DECORATION = re.compile(r"nvidia|geforce|tesla|quadro|rtx|hbm\w*|pcie|sxm\d?|gpu|[^a-z0-9]")


@dataclass(frozen=True)
class Card:
    """A card; of one that is known by its memory alone, speed is None.

    Attributes:
        memory: bytes.
        tflops: dense 16-bit products with float32 accumulation, 10^12 operations a second.
        bandwidth: of its memory, 10^9 bytes a second.
        cache: second-level cache, bytes.
        capability: compute capability, as 8.6.
    """

    name: str
    memory: int
    tflops: float | None
    bandwidth: float | None
    cache: int
    capability: float

    @property
    def has_bf16(self) -> bool:
        """Whether bfloat16 is in its hardware (Ampere and newer); older ones take fp16."""
        return self.capability >= 8


def _card(
    name: str, gib: int, tflops: float, bandwidth: float, cache_mib: float, capability: float
) -> Card:
    return Card(name, gib * _GIB, tflops, bandwidth, int(cache_mib * _MIB), capability)


CARDS = (
    _card("T4 16GB", 15, 65, 320, 4, 7.5),  # 15 GiB with its error correction on, as on Colab
    _card("RTX 2060 6GB", 6, 26, 336, 3, 7.5),
    _card("RTX 2070 8GB", 8, 30, 448, 4, 7.5),
    _card("RTX 2080 Ti 11GB", 11, 54, 616, 5.5, 7.5),
    _card("RTX 3050 8GB", 8, 18, 224, 2, 8.6),
    _card("RTX 3060 12GB", 12, 26, 360, 3, 8.6),
    _card("RTX 3060 Ti 8GB", 8, 32, 448, 4, 8.6),
    _card("RTX 3070 8GB", 8, 41, 448, 4, 8.6),
    _card("RTX 3080 10GB", 10, 60, 760, 5, 8.6),
    _card("RTX 3090 24GB", 24, 71, 936, 6, 8.6),
    _card("RTX A6000 48GB", 48, 155, 768, 6, 8.6),
    _card("A10 24GB", 24, 125, 600, 6, 8.6),
    _card("A100 40GB", 40, 312, 1555, 40, 8.0),
    _card("A100 80GB", 80, 312, 2039, 40, 8.0),
    _card("RTX 4060 8GB", 8, 30, 272, 24, 8.9),
    _card("RTX 4060 Ti 16GB", 16, 44, 288, 32, 8.9),
    _card("RTX 4070 12GB", 12, 58, 504, 36, 8.9),
    _card("RTX 4080 16GB", 16, 98, 717, 64, 8.9),
    _card("RTX 4090 24GB", 24, 165, 1008, 72, 8.9),
    _card("L4 24GB", 24, 121, 300, 48, 8.9),
    _card("L40S 48GB", 48, 362, 864, 96, 8.9),
    _card("H100 80GB", 80, 989, 3350, 50, 9.0),
    _card("RTX 5060 Ti 16GB", 16, 47, 448, 32, 12.0),
    _card("RTX 5070 12GB", 12, 62, 672, 48, 12.0),
    _card("RTX 5080 16GB", 16, 113, 960, 64, 12.0),
    _card("RTX 5090 32GB", 32, 210, 1792, 96, 12.0),
)
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


def find_card(name: str | float) -> Card:
    """The card of a name ("RTX 3060 12GB", "rtx3060", "T4") or of a memory ("12GB", 12).

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
        if found:
            raise ValueError(f"gpu: {text!r} is made as {_listed(found)}; name one")
    size = _SIZE.fullmatch(text)
    if size and 1 <= float(size[1]) <= _LARGEST_GB:
        memory = float(size[1])
        return Card(f"{memory:g} GB card", int(memory * _GIB), None, None, 4 * _MIB, 8.6)
    same = [card for card in CARDS if _key(_model(card)) and key.startswith(_key(_model(card)))]
    names = {_key(card.name): card for card in CARDS} | {_key(_model(card)): card for card in CARDS}
    near = same or [names[near] for near in difflib.get_close_matches(key, names, n=3, cutoff=0.5)]
    hint = f" Nearest: {_listed(near)}." if near else ""
    raise ValueError(
        f"gpu: no card is known as {text!r}.{hint} Wanted a card's name, a memory such as '12GB', "
        "or 'cpu'"
    )


def _listed(cards: list[Card]) -> str:
    return ", ".join(dict.fromkeys(card.name for card in cards))
