"""Graphics cards that people train on: what of them decides whether a run fits, and how fast.

From the makers' data sheets: memory, dense 16-bit tensor throughput with float32 accumulation (on
GeForce cards half of the headline figure), memory bandwidth, second-level cache: `cards.csv`.
Peaks, not what a run reaches.
"""

import csv
import difflib
import re
from dataclasses import dataclass
from pathlib import Path

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
        capability: compute capability, as 8.6; of other makers' 8 where bfloat16 is in hardware.
        kind: torch's type of the device.
    """

    name: str
    memory: int
    tflops: float | None
    bandwidth: float | None
    cache: int
    capability: float
    kind: str = "cuda"

    @property
    def has_bf16(self) -> bool:
        """Whether bfloat16 is in its hardware (Ampere and newer); older ones take fp16."""
        return self.capability >= 8


def _read() -> tuple[Card, ...]:
    with Path(__file__).with_suffix(".csv").open(encoding="utf-8", newline="") as file:
        return tuple(
            Card(
                row["name"], int(row["gib"]) * _GIB, float(row["tflops"]), float(row["bandwidth"]),
                int(float(row["cache_mib"]) * _MIB), float(row["capability"]),
            )
            for row in csv.DictReader(file)
        )  # fmt: skip


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
