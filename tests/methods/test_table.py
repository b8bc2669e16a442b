"""What a method is where nobody says otherwise, and what isn't its own is refused."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from rmipo_lite.config import RMiPOConfig
from rmipo_lite.methods.table import RANGES, SumLoss, defaults_of, methods
from tests.conftest import ROOT

_OF_SUMS = {name: m for name, m in methods().items() if isinstance(m, SumLoss)}


@pytest.mark.parametrize("name", methods())
def test_a_config_has_the_methods_own_constants(name: str, tmp_path: Path) -> None:
    args = RMiPOConfig(str(tmp_path), loss_type=name)
    for option, value in defaults_of(name).items():
        assert getattr(args, option) == value
    for option in RANGES.keys() - defaults_of(name).keys():
        assert getattr(args, option) is None
    # A copy made from the fields is the same run.
    again = RMiPOConfig(**{f: getattr(args, f) for f in (*RANGES, "loss_type", "output_dir")})
    assert again.method_options == args.method_options


def test_defaults_that_a_reader_looks_up(tmp_path: Path) -> None:
    def options(name: str) -> tuple[Any, ...]:
        args = RMiPOConfig(str(tmp_path), loss_type=name)
        return args.beta, args.sft_weight, args.end_anchor, args.length_balance

    assert options("rmipo") == options("simpo") == (2.0, 0.5, 0.1, "auto")
    assert options("dpo") == options("ipo") == (0.1, 0.0, 0.0, "off")
    assert options("cpo") == options("orpo") == (0.1, 1.0, 0.0, "off")
    assert RMiPOConfig(str(tmp_path), loss_type="robust").label_smoothing == 0.1
    alphapo = RMiPOConfig(str(tmp_path), loss_type="alphapo")
    assert (alphapo.beta, alphapo.simpo_gamma, alphapo.alpha) == (2.5, 0.1, 0.25)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"loss_type": "sigmoid"}, "is dpo (trl's DPOTrainer, LLaMA-Factory) or cpo"),
        (
            {"loss_type": "dpo", "simpo_gamma": 0.5},
            "simpo_gamma must be None, since loss_type='dpo'",
        ),
        ({"loss_type": "dpo", "alpha": 0.1}, "alpha must be None, since loss_type='dpo' has none"),
        ({"loss_type": "simpo", "ld_alpha": 0.5}, "ld_alpha must be None, since loss_type='simpo'"),
        ({"loss_type": "dpo", "ld_alpha": 1.5}, "ld_alpha must be None or 0 to 1, got 1.5"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, "label_smoothing must be in [0, 0.5)"),
        ({"loss_type": "dpo", "beta": 0.0}, "beta must be a number > 0, got 0.0"),
        ({"loss_type": "dpop", "dpop_lambda": -1.0}, "dpop_lambda must be a number >= 0, got -1.0"),
        (
            {"loss_type": "slic", "slic_delta": math.nan},
            "slic_delta must be a number >= 0, got nan",
        ),
        ({"loss_type": "kto_pair", "length_balance": "auto"}, "length_balance must be off with"),
        ({"gamma_beta_ratio": -1.0}, "gamma_beta_ratio must be a number >= 0, got -1.0"),
        ({"gamma_beta_ratio": 0.5, "simpo_gamma": 0.5}, "simpo_gamma and gamma_beta_ratio say"),
        ({"loss_type": "dpo", "gamma_beta_ratio": 0.5}, "simpo_gamma must be None, since"),
        ({"reference": "later"}, "reference must be one of cached, live"),
    ],
)
def test_what_has_no_part_in_a_method_is_refused(
    options: dict[str, Any], told: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        RMiPOConfig(str(tmp_path), **options)


def test_names_that_mean_the_same(tmp_path: Path) -> None:
    assert RMiPOConfig(str(tmp_path), loss_type="sigmoid_norm").loss_type == "dpo_norm"
    ratio = RMiPOConfig(str(tmp_path), loss_type="simpo", beta=2.5, gamma_beta_ratio=0.55)
    assert ratio.simpo_gamma == pytest.approx(1.375)
    assert RMiPOConfig(**{
        name: getattr(ratio, name)
        for name in ("loss_type", "beta", "gamma_beta_ratio", "simpo_gamma", "output_dir")
    }).simpo_gamma == ratio.simpo_gamma  # fmt: skip


def test_the_docs_have_a_row_for_each() -> None:
    page = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| (yes|no) \|", page, re.MULTILINE))
    assert rows == {name: "yes" if m.needs_reference else "no" for name, m in _OF_SUMS.items()}
    for name, method in _OF_SUMS.items():
        assert method.remembers or method.formula.__name__ == name
        assert f"| b {method.defaults['beta']:g}" in page.split(f"| `{name}` |")[1].split("\n")[0]
