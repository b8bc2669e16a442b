"""What is compared: names, options and rates."""

from __future__ import annotations

from typing import Any

import pytest

from rmipo_lite.comparing.contenders import contenders
from rmipo_lite.methods.table import methods


def _names(*args: Any) -> list[str]:
    return [one.name for one in contenders(*args, {})]


def test_names_options_and_rates() -> None:
    wanted = ["rmipo", {"loss_type": "dpo", "beta": 0.05}, {"loss_type": "dpo", "name": "mine"}]
    assert _names(wanted, None) == ["rmipo", "dpo beta=0.05", "mine"]
    assert _names(["rmipo", "sigmoid_norm"], [1e-4, 0.001]) == [
        "rmipo at 0.0001", "rmipo at 0.001", "dpo_norm at 0.0001", "dpo_norm at 0.001",
    ]  # fmt: skip
    found = contenders(["rmipo", "dpo"], {"dpo": 1e-5}, {})
    assert [one.options for one in found] == [
        {"loss_type": "rmipo"}, {"loss_type": "dpo", "learning_rate": 1e-5},
    ]  # fmt: skip
    assert _names("all", None) == list(methods())
    assert contenders([{"loss_type": "dpo", "name": "a/b: c"}], None, {})[0].folder == "a-b-c"


@pytest.mark.parametrize(
    ("wanted", "rates", "config", "told"),
    [
        ("dpo", None, {}, "must be a list of names"),
        (["nothing"], None, {}, "loss_type must be one of"),
        (["sigmoid"], None, {}, "name one"),
        ([{"beta": 1.0}], None, {}, "a dict with loss_type"),
        ([], None, {}, "none is there"),
        (["dpo", "dpo"], None, {}, "'dpo' is there twice; give one a name"),
        ([{"loss_type": "dpo", "seed": 3}], None, {}, "seed is one for all"),
        (
            [{"loss_type": "dpo", "beta": -1.0}],
            None,
            {},
            "dpo beta=-1.0: RMiPOConfig: beta must",
        ),
        ([{"loss_type": "dpo", "betta": 1.0}], None, {}, "did you mean"),
        (["dpo", "rmipo"], {"simpo": 1e-4}, {}, "'simpo' is none of the methods"),
        (["dpo"], [], {}, "an empty list"),
        ([{"loss_type": "dpo", "learning_rate": 1e-4}], 1e-5, {}, "it has a learning_rate"),
        (
            ["dpo"],
            None,
            {"simpo_gamma": 1.0},
            "dpo: RMiPOConfig: simpo_gamma must be None",
        ),
    ],
)
def test_what_cannot_be_compared(wanted: Any, rates: Any, config: Any, told: str) -> None:
    with pytest.raises((ValueError, TypeError), match=told):
        contenders(wanted, rates, config)
