"""The table is the one place of a loss's facts: what is in it works, what isn't is refused."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from rmipo_lite.config import RMiPOConfig
from rmipo_lite.inspection.pair_scores import loss_weight
from rmipo_lite.ops import pair_loss, rmipo_loss
from rmipo_lite.ops.checks import check_options
from rmipo_lite.ops.losses import LOSSES, RANGES, Loss, PairOptions, losses_with, margins
from rmipo_lite.ops.reference import pair_losses
from rmipo_lite.results.model_card import model_card
from rmipo_lite.step.pair_values import PairValues
from rmipo_lite.watch.chart import Chart
from rmipo_lite.watch.symptoms import examine
from tests.conftest import ROOT
from tests.kit import random_pairs, tiny_trainer

OF_MEANS = "loss_type must be one of rmipo, simpo, hinge, simper, got 'nope'"
ONE_OF = "loss_type must be one of rmipo, simpo, hinge, simper, dpo, robust, "


def _squared(chosen: Tensor, rejected: Tensor, gamma: Tensor, options: PairOptions):
    """(beta (w - l) - gamma)^2, as a reader would write it."""
    short = options.beta * (chosen - rejected) - gamma
    return short**2, 2 * options.beta * short, -2 * options.beta * short


SQUARED = Loss(
    _squared, "a square of the margin", margin="constant", has_beta=True, beta_in_rewards=True,
    smoothable=False, kernel=None,
)  # fmt: skip


def test_a_loss_is_added_in_the_table_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Config, operator, training, metrics, findings, card and inspection take it from there."""
    monkeypatch.setitem(LOSSES, "squared", SQUARED)
    trainer = tiny_trainer(
        tmp_path, pairs=random_pairs(8), loss_type="squared", simpo_gamma=1.0, max_steps=2
    )
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["rewards/margins"] == pytest.approx(
        2.0 * (logged["logps/chosen"] - logged["logps/rejected"]), abs=1e-4
    )
    assert "rmipo/gamma" not in logged
    out = pair_loss(
        torch.tensor([-1.0, -2.0]), torch.tensor([0, 1, 2], dtype=torch.int32),
        loss_type="squared", simpo_gamma=0.5,
    )  # fmt: skip
    assert out.loss.item() == pytest.approx((2 * 1.0 - 0.5) ** 2)
    values = PairValues.of(out, torch.tensor([0, 1, 2]), (torch.zeros(1), torch.zeros(1)))
    args = RMiPOConfig(str(tmp_path), loss_type="squared", simpo_gamma=0.5)
    assert loss_weight(values, args).item() == pytest.approx(2 * 1.5)
    rose = [
        {"step": step, "eval_rewards/margins": margin, "eval_logps/rejected": -5.0 - step}
        for step, margin in ((0, 0.0), (40, 9.0))
    ]
    errors = {"eval_rewards/margins": 0.1}
    found = examine(Chart(args, held_out=rose, pairs=50, max_steps=40, errors=errors))
    assert "overshooting" in [finding.name for finding in found]
    assert "a square of the margin" in model_card(_record(args))
    with pytest.raises(ValueError, match="label_smoothing must be 0 for loss_type='squared'"):
        RMiPOConfig(str(tmp_path), loss_type="squared", label_smoothing=0.1)


def _record(args: RMiPOConfig) -> SimpleNamespace:
    return SimpleNamespace(
        args=args, base_model_name="", model=None, weights_step=None, history=[],
        learning_rate=None, stopped_at_step=None, metrics={}, metrics_before={}, findings=[],
        errors={},
        data_report=SimpleNamespace(facts=list), conversational=False,
    )  # fmt: skip


def test_a_loss_that_is_not_in_the_table_is_an_error_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=re.escape(ONE_OF)):
        RMiPOConfig(str(tmp_path), loss_type="nope")
    args = RMiPOConfig(str(tmp_path))
    args.loss_type = "nope"
    means, borders = torch.tensor([-1.0, -2.0]), torch.tensor([0, 1, 2], dtype=torch.int32)
    known = pair_loss(means, borders, loss_type="simper")
    values = PairValues.of(known, borders, (torch.zeros(1), torch.zeros(1)))
    chart = Chart(
        args, held_out=[{"step": s, "eval_rewards/margins": 0.0, "eval_logps/rejected": -5.0}
                        for s in (0, 9)],
    )  # fmt: skip
    for wanted, reader in (
        (ONE_OF, lambda: args.uses_prior),
        (OF_MEANS, lambda: pair_loss(means, borders, loss_type="nope")),
        (OF_MEANS, lambda: check_options(args.pair_options)),
        (OF_MEANS, lambda: pair_losses(means, borders, None, None, args.pair_options)),
        (OF_MEANS, lambda: margins(means, args.pair_options)),
        (ONE_OF, lambda: loss_weight(values, args)),
        (ONE_OF, lambda: examine(chart)),
        (ONE_OF, lambda: model_card(_record(args))),
    ):
        with pytest.raises(ValueError, match=re.escape(wanted)):
            reader()


def test_the_kernel_refuses_a_number_it_does_not_know() -> None:
    from rmipo_lite.ops import native, status

    if not status("cpu").available:
        pytest.skip("no compiled kernels here")
    options = PairOptions("simpo", 2.0, 0.3, 1.6, False, 0.0, 0.5)
    means, borders = torch.tensor([-1.0, -2.0]), torch.tensor([0, 1, 2], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="loss_type must be 0 to 3, got 4"):
        native.pair_losses(means, borders, None, None, options, 4)


def test_kernels_are_numbered_as_in_the_header() -> None:
    header = (ROOT / "csrc" / "pair_math.h").read_text(encoding="utf-8")
    numbers = dict(re.findall(r"k(\w+) = (\d+)", header))
    ours = {name.capitalize(): str(loss.kernel) for name, loss in LOSSES.items()}
    wanted = {"Rmipo": "0", "Simpo": "1", "Hinge": "2", "Simper": "3"}
    assert ours == wanted
    assert {name: numbers[name] for name in wanted} == wanted
    assert f"kNumLossTypes = {len(wanted)}" in header


def test_texts_name_the_losses_by_their_facts() -> None:
    assert losses_with(smoothable=True) == "rmipo, simpo"
    help_of = {
        f.name: f.metadata.get("help", "") for f in RMiPOConfig.__dataclass_fields__.values()
    }
    assert help_of["loss_type"].startswith("Method: rmipo, simpo, hinge, simper, dpo, ")
    margins = "simpo, hinge, alphapo, alpha_dpo, gamma_simpo, gamma_dpo: "
    assert help_of["simpo_gamma"].startswith(margins)


@pytest.mark.parametrize("name", RANGES)
def test_ranges_are_one_list_for_operator_and_run(name: str, tmp_path: Path) -> None:
    """A run is asked for no less than the operator, and both by the list's own words."""
    means = [torch.zeros(1)] * 4
    for value in (-1.0, -1e-9, 0.0, 0.3, 0.4999, 0.5, 0.9, 1.0, 1.5, math.inf, math.nan):
        options = {name: value}
        if name == "gamma_min" and value > 1.6:
            options["gamma_max"] = value
        if name == "gamma_max" and value < 0.3:
            options["gamma_min"] = value
        allowed = RANGES[name]
        assert allowed.holds(value) or not allowed.strict(value)
        if name in rmipo_loss.__kwdefaults__:
            _agrees(lambda o=options: rmipo_loss(*means, **o), allowed.holds(value), allowed.wanted)
        _agrees(
            lambda o=options: RMiPOConfig(str(tmp_path), **o),
            allowed.strict(value), allowed.strictly_wanted,
        )  # fmt: skip


def _agrees(call, holds: bool, wanted: str) -> None:
    if holds:
        call()
        return
    with pytest.raises(ValueError, match=re.escape(wanted)):
        call()
