"""The runs of the study: which loss, rate, weights and steps on which task, and in which order."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

RATES = (3e-4, 1e-3, 3e-3, 1e-2)
LOSSES: dict[str, dict[str, Any]] = (
    {
        "rmipo": {"loss_type": "rmipo"},
        "simper": {"loss_type": "simper"},
    }
    | {
        f"simpo {beta:g} {gamma:g}": {"loss_type": "simpo", "beta": beta, "simpo_gamma": gamma}
        for beta in (2.0, 10.0)
        for gamma in (0.3, 0.8, 1.6)
    }
    | {f"dpo {beta:g}": {"loss_type": "dpo", "beta": beta} for beta in (0.05, 0.1, 0.5)}
)
UNTUNED = ("rmipo", "simper")  # losses without a constant that anybody sweeps
TUNED = tuple(loss for loss in LOSSES if loss not in UNTUNED)
_TWINS = ("simpo 2 0.8", "simpo 2 1.6")  # RMiPO with constant margins about as large
_PEERS = ("simpo 10 0.3", "simpo 2 0.8", "dpo 0.1")  # of the worlds beside the demo's
ANCHOR, SFT = 0.1, 0.5  # the defaults
GUARDS_AT = {"gemma": "0.001"}  # the rate at which they are switched one by one; else "auto"
# Tasks whose chosen side isn't longer: nothing is weighed, and "off" is bit for bit the same run.
UNWEIGHED = ("clean", "noisy")


@dataclass(frozen=True)
class Cell:
    """One run. `rate` is a number, "auto", or "auto from" where the search begins elsewhere."""

    world: str
    task: str
    loss: str
    rate: str
    seed: int
    balance: str = "auto"
    anchor: float = ANCHOR
    sft: float = SFT
    steps: int = 80
    batch: int = 16
    rank: int = 16

    @property
    def key(self) -> tuple[str, ...]:
        """As it stands in the rows."""
        return tuple(str(value) for value in vars(self).values())


_DEFAULTS, _BARE = (ANCHOR, SFT), (0.0, 0.0)


def small(tasks: tuple[str, ...]) -> Iterator[Cell]:
    """Of the demo's world, seed by seed: an interrupted study has something of everything."""
    rates = ("auto", *map("{:g}".format, RATES))
    for seed in range(3):
        yield from _grid("demo", tasks, UNTUNED, rates, (seed,))
        yield from _grid("demo", tasks, UNTUNED, rates, (seed,), guards=_BARE)
        yield from _end_rules("demo", tasks, ("auto",), (seed,))
        if seed < 2:
            yield from _grid("demo", tasks, _TWINS, rates[1:], (seed,), guards=_BARE)
        yield from _shapes("demo", tasks, (seed,))
    yield from _grid("demo", tasks, UNTUNED, rates, range(3, 5))
    yield from _grid("demo", tasks, TUNED, rates[1:], range(2), guards=_BARE)


def real(tasks: tuple[str, ...]) -> Iterator[Cell]:
    """Of the real model: short runs, since each takes minutes, and what matters most first."""
    shape: dict[str, Any] = {"steps": 20, "batch": 8}
    rates = ("0.0003", "0.001", "0.0001")
    for seed in range(2):
        for rate in ("auto", *rates, "0.003"):
            yield from _grid("gemma", tasks, ("rmipo",), (rate,), (seed,), ("auto",), **shape)
    for seed in range(2):
        yield from _grid("gemma", tasks, _PEERS, rates, (seed,), ("off",), guards=_BARE, **shape)
    at = (GUARDS_AT["gemma"],)
    weighed = [task for task in tasks if task not in UNWEIGHED]
    for seed, guards in itertools.product(range(2), (_BARE, (ANCHOR, 0.0), (0.0, SFT), _DEFAULTS)):
        for among, balance in ((tasks, "auto"), (weighed, "off")):
            yield from _grid(
                "gemma", among, ("rmipo",), at, (seed,), (balance,), guards=guards, **shape
            )


def stories(tasks: tuple[str, ...]) -> Iterator[Cell]:
    """Of the third world, which no constant was set by: the package's own losses, then peers."""
    rates = tuple(map("{:g}".format, RATES))
    for seed in range(3):
        yield from _grid("stories", tasks, UNTUNED, ("auto", *rates), (seed,), ("auto",))
    for seed in range(2):
        yield from _grid("stories", tasks, _PEERS, rates[:3], (seed,), ("off",), guards=_BARE)


def _grid(
    world: str, tasks: Any, losses: Any, rates: Any, seeds: Any, balances: Any = ("auto", "off"),
    guards: tuple[float, float] = _DEFAULTS, **shape: Any,
) -> Iterator[Cell]:  # fmt: skip
    for seed, rate, loss, balance, task in itertools.product(seeds, rates, losses, balances, tasks):
        if world != "demo" or task not in UNWEIGHED or balance == "auto":
            yield Cell(world, task, loss, rate, seed, balance, *guards, **shape)


def _end_rules(world: str, tasks: Any, rates: Any, seeds: Any, **shape: Any) -> Iterator[Cell]:
    """One of the two guards, with and without balance; none and both stand in the grid."""
    for guards in ((ANCHOR, 0.0), (0.0, SFT)):
        yield from _grid(world, tasks, UNTUNED, rates, seeds, guards=guards, **shape)


def _shapes(world: str, tasks: Any, seeds: Any) -> Iterator[Cell]:
    """The default alone, in other shapes, and with a search that begins elsewhere."""
    shapes: list[dict[str, Any]] = [
        {"rank": 4}, {"rank": 32}, {"batch": 8}, {"batch": 64}, {"steps": 40}, {"steps": 400},
    ]  # fmt: skip
    for seed, task in itertools.product(seeds, tasks):
        for shape in shapes:
            yield Cell(world, task, "rmipo", "auto", seed, **shape)
        for start in ("1e-07", "1e-05"):
            yield Cell(world, task, "rmipo", f"auto from {start}", seed)
