"""What an option decides: its panel, its lines, and nothing where nothing was swept."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from rmipo_lite.checkpoints.weights import CONFIG_FILE
from rmipo_lite.comparing.sensitivity import sensitivity, with_defaults
from rmipo_lite.comparing.worth import Estimated

OPTIONS = {
    "rmipo": {"loss_type": "rmipo", "learning_rate": 1e-4},
    "simpo a": {"loss_type": "simpo", "beta": 2.0, "learning_rate": 1e-4},
    "simpo b": {"loss_type": "simpo", "beta": 10.0, "learning_rate": 1e-4},
    "simpo c": {"loss_type": "simpo", "beta": 2.0, "learning_rate": 1e-2},
    "simpo d": {"loss_type": "simpo", "beta": 4.0, "learning_rate": 1e-2, "length_norm": True},
}
MEANS = {name: Estimated(0.5 + place / 10, 0.01) for place, name in enumerate(OPTIONS)}


def test_a_panel_an_option_and_a_line_for_what_is_alike_but_for_it() -> None:
    found = sensitivity(OPTIONS, MEANS, "win rate", "")
    panels = {axes.get_xlabel(): axes for axes in found["sensitivity"].figure.axes}
    assert list(panels) == ["learning_rate", "beta"]
    for name, wanted in {
        "learning_rate": {"simpo, beta=2.0": ([1e-4, 1e-2], [0.6, 0.8])},
        "beta": {"simpo, learning_rate=0.0001": ([2.0, 10.0], [0.6, 0.7])},
    }.items():
        drawn = {
            bars.get_label(): (list(bars[0].get_xdata()), list(bars[0].get_ydata()))
            for bars in panels[name].containers
        }
        assert drawn.keys() == wanted.keys()
        for label, (at, values) in wanted.items():
            assert drawn[label] == (pytest.approx(at), pytest.approx(values))
    assert panels["learning_rate"].get_xscale() == "log"
    assert panels["beta"].get_xscale() == "linear"
    assert "Win rate over the values of learning_rate, beta" in found["sensitivity"].caption


def test_where_nothing_was_swept_it_says_so() -> None:
    two = {name: OPTIONS[name] for name in ("rmipo", "simpo a")}
    assert list(sensitivity(two, MEANS, "win rate", "")) == []
    assert "no two methods differ" in str(sensitivity(two, MEANS, "win rate", ""))
    unmeasured = {name: Estimated(math.nan, math.nan) for name in OPTIONS}
    assert list(sensitivity(OPTIONS, unmeasured, "win rate", "")) == []


def test_what_a_method_had_without_being_told_is_a_point_too(tmp_path: Path) -> None:
    """One that kept its default stands beside those that were given another value."""
    configs = {
        "rmipo": {"loss_type": "rmipo", "beta": 2.0, "gamma_max": 1.6, "learning_rate": "auto"},
        "rmipo 5": {"loss_type": "rmipo", "beta": 5.0, "gamma_max": 0.8, "learning_rate": "auto"},
        "dpo": {"loss_type": "dpo", "beta": 0.1, "gamma_max": 1.6, "learning_rate": "auto"},
    }
    given = {
        "rmipo": {"loss_type": "rmipo"}, "dpo": {"loss_type": "dpo"},
        "rmipo 5": {"loss_type": "rmipo", "beta": 5.0, "gamma_max": 0.8},
    }  # fmt: skip
    for name, config in configs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / CONFIG_FILE).write_text(json.dumps(config))
    found = with_defaults({name: (own, tmp_path / name) for name, own in given.items()})
    assert found == {
        "rmipo": {"loss_type": "rmipo", "beta": 2.0, "gamma_max": 1.6},
        "dpo": {"loss_type": "dpo", "beta": 0.1},  # which has no gamma_max
        "rmipo 5": {"loss_type": "rmipo", "beta": 5.0, "gamma_max": 0.8},
    }  # fmt: skip
