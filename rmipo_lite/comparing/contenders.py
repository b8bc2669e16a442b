"""What is compared: methods with their options and rates, each under a name of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rmipo_lite.config import RMiPOConfig
from rmipo_lite.methods.table import full_name, methods

Methods = str | Sequence[str | Mapping[str, Any]]
Rates = Sequence[float] | Mapping[str, Any] | float | None

DEFAULT = ("rmipo", "simpo", "dpo")
_NOT_A_METHODS = {"output_dir", "seed"}  # of the comparison as a whole


@dataclass(frozen=True)
class Contender:
    """A method as it is trained: its name in tables and folders, and the options it differs in."""

    name: str
    options: dict[str, Any]

    @property
    def folder(self) -> str:
        """A folder's name."""
        return re.sub(r"[^\w.=+-]+", "-", self.name).strip("-")


def contenders(methods_wanted: Methods, rates: Rates, config: Mapping[str, Any]) -> list[Contender]:
    """Every method with every rate, in the order given.

    Args:
        methods_wanted: names, or dicts of options with `loss_type` (and `name`, where it is to
            have another); "all" is every method there is.
        rates: for all methods, or by their names; None leaves the config's.
        config: the options that all share.

    Raises:
        ValueError, TypeError: a method, an option or a rate that can't be; two of one name.
    """
    wanted = list(methods()) if methods_wanted == "all" else methods_wanted
    if isinstance(wanted, str) or not isinstance(wanted, Sequence):
        raise TypeError(
            'methods must be a list of names or of dicts with loss_type, or "all", got '
            f"{methods_wanted!r}"
        )
    found = [one for method in wanted for one in _with_rates(_named(method), rates)]
    names = [one.name for one in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if not names or twice is not None:
        what = "none is there" if twice is None else f"{twice!r} is there twice; give one a name"
        raise ValueError(f"methods: {what}")
    if isinstance(rates, Mapping):
        known = {_named(method).name for method in wanted}
        unknown = sorted(rates.keys() - known)
        if unknown:
            raise ValueError(
                f"learning_rates: {', '.join(map(repr, unknown))} is none of the methods "
                f"({', '.join(sorted(known))})"
            )
    for one in found:
        try:
            RMiPOConfig("rmipo-compare", **{**config, **one.options})
        except (ValueError, TypeError) as error:
            raise ValueError(f"methods, {one.name}: {error}") from error
    return found


def _named(method: str | Mapping[str, Any]) -> Contender:
    if isinstance(method, str):
        return Contender(full_name(method), {"loss_type": full_name(method)})
    if not isinstance(method, Mapping) or "loss_type" not in method:
        raise ValueError(f"methods: wanted a name or a dict with loss_type, got {method!r}")
    options = {name: value for name, value in method.items() if name != "name"}
    bad = sorted(_NOT_A_METHODS & options.keys())
    if bad:
        raise ValueError(f"methods: {bad[0]} is one for all; pass it beside the methods")
    options["loss_type"] = full_name(options["loss_type"])
    own = [f"{name}={value}" for name, value in options.items() if name != "loss_type"]
    return Contender(str(method.get("name") or " ".join([options["loss_type"], *own])), options)


def _with_rates(method: Contender, rates: Rates) -> list[Contender]:
    own = rates.get(method.name) if isinstance(rates, Mapping) else rates
    if own is None:
        return [method]
    several = list(own) if isinstance(own, Sequence) and not isinstance(own, str) else [own]
    if not several:
        raise ValueError("learning_rates: an empty list; None takes the options' own")
    if "learning_rate" in method.options:
        raise ValueError(f"methods, {method.name}: it has a learning_rate, and so says the call")
    if len(several) == 1:
        return [Contender(method.name, {**method.options, "learning_rate": several[0]})]
    return [
        Contender(f"{method.name} at {rate}", {**method.options, "learning_rate": rate})
        for rate in several
    ]
