"""How several cards share a run, counted: what one of them holds, and what is sent meanwhile.

Speeds between cards are assumptions, and nothing here was measured on cards: 10 GB/s a card over
PCIe, 200 over the NVLink of server cards. What is sent is counted as if it never ran beside
products, which it can.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from rmipo_lite.planning.cards import Card
from rmipo_lite.planning.footprint import Setup, Weights
from rmipo_lite.planning.workload import Workload

_PCIE, _NVLINK = 10e9, 200e9  # bytes a second and card
_OF_NVLINK = ("A100", "H100", "H200", "V100")
_BLOCKS = 2  # of a model whose layers are shared out, whole at a time: at work, and the next one


@dataclass(frozen=True)
class Layout:
    """How a run is laid over cards.

    Attributes:
        name: as it is shown.
        cards: how many there are, a process each.
        shards: whether each holds a part of every layer (FSDP2), or the whole model.
    """

    name: str = ""
    cards: int = 1
    shards: bool = False

    def share(self, work: Workload) -> Workload:
        """The same data, of whose steps a card computes a share."""
        return replace(work, step=math.ceil(work.step / self.cards))

    def parts(
        self, parts: dict[str, int], weights: Weights, setup: Setup, layers: int
    ) -> dict[str, int]:
        """What one card holds of a run's parts, bytes; `layers`: blocks of the model."""
        if not self.shards:
            return parts
        shared = {name: parts[name] // self.cards for name in ("adapter", "gradients", "optimizer")}
        if setup.peft_config is None:  # the ends' own are whole on every card
            ends = weights.others / weights.trained
            shared = {n: int((ends + (1 - ends) / self.cards) * parts[n]) for n in shared}
        return {
            **parts,
            **shared,
            "weights": weights.loaded_bytes(setup, self.cards),
            "gathered": _BLOCKS * _of_layers(weights, setup) // layers,
        }

    def seconds_sent(
        self, card: Card, setup: Setup, weights: Weights, work: Workload, steps: int, tokens: int
    ) -> float:
        """Seconds of an epoch in which something is sent.

        Of gradients twice their bytes a step; of shared layers all their weights three times a
        micro-step: forward, backward and the prior's pass.
        """
        if self.cards == 1:
            return 0.0
        speed = _NVLINK if any(name in card.name for name in _OF_NVLINK) else _PCIE
        rest = (self.cards - 1) / self.cards
        if not self.shards:
            return 2 * rest * weights.gradient_bytes(setup) * steps / speed
        micro_steps = max(steps, work.policy / self.cards / tokens)
        return 3 * rest * _of_layers(weights, setup) * micro_steps / speed


def _of_layers(weights: Weights, setup: Setup) -> int:
    return weights.loaded_bytes(setup) - weights.others * setup.dtype.itemsize


ALONE = Layout()


def layouts_of(cards: int) -> list[Layout]:
    """Those that so many cards can take."""
    return [Layout("each the whole model", cards), Layout("FSDP2, each a part", cards, True)]
