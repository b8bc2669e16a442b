from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rmipo_lite.config import RMiPOConfig
from rmipo_lite.step import pair_values
from rmipo_lite.step.pair_values import PairValues


def _values(chosen: list[float], rejected: list[float], gamma: list[float]) -> PairValues:
    n = len(chosen)
    return PairValues(
        loss=torch.ones(n),
        chosen_logps=torch.tensor(chosen),
        rejected_logps=torch.tensor(rejected),
        gamma=torch.tensor(gamma),
        pmi_gap=torch.zeros(n),
        chosen_pmi=torch.tensor([float("nan")] + [2.0] * (n - 1)),
        rejected_pmi=torch.ones(n),
        chosen_length=torch.full((n,), 4.0),
        rejected_length=torch.full((n,), 2.0),
        chosen_reward=2 * torch.tensor(chosen),
        rejected_reward=2 * torch.tensor(rejected),
        label=torch.full((n,), float("nan")),
    )


def test_means_over_pairs_whatever_the_parts(tmp_path: Path) -> None:
    """Three pairs in parts of 1 + 2 and of 3: a mean of means would weigh the first pair double."""
    args = RMiPOConfig(str(tmp_path))
    whole = _values([-1.0, -2.0, -3.0], [-2.0, -1.0, -6.0], [1.6, 0.3, 0.5])
    parts = [
        PairValues(**{k: getattr(whole, k)[a:b] for k in PairValues.__dataclass_fields__})
        for a, b in ((0, 1), (1, 3))
    ]
    assert pair_values.reduce(parts, args) == pair_values.reduce([whole], args)
    reduced = pair_values.reduce(parts, args)
    assert reduced["rewards/accuracies"] == pytest.approx(2 / 3)
    assert reduced["rewards/chosen"] == pytest.approx(-4.0)
    assert reduced["rewards/margins"] == pytest.approx(2.0)
    assert reduced["rmipo/gamma"] == pytest.approx(0.8)
    assert reduced["rmipo/gamma_at_max"] == pytest.approx(1 / 3)
    assert reduced["rmipo/gamma_at_min"] == pytest.approx(1 / 3)  # up to 0.3 + 0.05 * 1.3
    assert reduced["rmipo/pmi_undefined"] == pytest.approx(1 / 3)
    assert reduced["rmipo/pmi_chosen"] == pytest.approx(2.0)
    assert reduced["lengths/chosen"] == 4.0


@pytest.mark.parametrize(("loss_type", "scale"), [("rmipo", 2.0), ("simper", 1.0), ("dpo", 0.1)])
def test_an_older_checkpoints_values_have_rewards_of_means(
    loss_type: str, scale: float, tmp_path: Path
) -> None:
    """Whatever the run goes on with."""
    whole = vars(_values([-1.0, -3.0], [-2.0, -2.0], [0.5, 0.5]))
    newer = ("chosen_reward", "rejected_reward", "label")
    older = {name: value for name, value in whole.items() if name not in newer}
    args = RMiPOConfig(str(tmp_path), loss_type=loss_type)
    values = pair_values.restored(older, args, torch.device("cpu"))
    assert values.has_chosen.all()
    assert values.has_rejected.all()
    assert values.chosen_reward.tolist() == pytest.approx([-scale, -3 * scale])
    kept = pair_values.restored(whole, args, torch.device("cpu"))
    assert torch.equal(kept.chosen_reward, whole["chosen_reward"])


def test_means_of_unpaired_rows_are_over_the_rows_of_a_label(tmp_path: Path) -> None:
    args = RMiPOConfig(str(tmp_path), loss_type="kto", beta=0.5)
    values = _values([1.0, -1.0, 3.0], [4.0, -2.0, 1.0], [0.0] * 3)
    rows = replace(values, label=torch.tensor([1.0, 0.0, 1.0]))
    told = pair_values.reduce([rows], args)
    assert told["rewards/chosen"] == 4.0  # of 2 and 6
    assert told["rewards/rejected"] == -4.0
    assert told["rewards/margins"] == 8.0
    assert told["logps/chosen"] == 2.0
    assert told["lengths/rejected"] == 2.0
    assert told["rewards/accuracies"] == 1.0
    assert told["kl"] == pytest.approx((8 - 2 + 2) / 3 / 0.5)  # the other sides'
    own = pair_values.cases(rows, args)
    assert own["rewards/chosen"][0::2] == [2.0, 6.0]
    assert own["rewards/rejected"][1] == -4.0
    assert all(math.isnan(own["rewards/rejected"][place]) for place in (0, 2))
    alone = pair_values.reduce([pair_values.select(rows, torch.tensor([True, False, True]))], args)
    assert alone["rewards/chosen"] == 4.0
    assert not alone.keys() & {"rewards/rejected", "logps/rejected", "rewards/margins"}


def test_no_pairs_no_numbers(tmp_path: Path) -> None:
    assert pair_values.reduce([], RMiPOConfig(str(tmp_path))) == {}
