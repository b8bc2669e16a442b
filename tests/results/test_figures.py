"""The paper's figures from a run's numbers: what an axis shows, what is missing, and the files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import rmipo_lite
from rmipo_lite import demo
from rmipo_lite.cli.main import main
from rmipo_lite.results.figures import figures_of
from rmipo_lite.results.run_file import FILE, RunNumbers, read_numbers

NAMES = ["gamma", "rewards", "accuracy", "dynamics", "efficiency"]


def _columns(count: int, **columns: list[float]) -> dict[str, dict[str, float]]:
    named = {
        "gap": "rmipo/pmi_gap", "gamma": "rmipo/gamma", "right": "rewards/accuracies",
        "margin": "rewards/margins", "chosen": "lengths/chosen", "rejected": "lengths/rejected",
    }  # fmt: skip
    return {
        f"eval_{named[name]}": {str(i): values[i % len(values)] for i in range(count)}
        for name, values in columns.items()
    }


def test_every_figure_of_a_run_and_of_its_folder_alone(run: Any) -> None:
    own, read = run.figures(), figures_of(read_numbers(run.output_dir))
    assert list(own) == list(read) == NAMES
    assert own.missing == {}
    axes = own["gamma"].figure.axes[0]
    for dots, values in zip(axes.collections, (run.held_out.first, run.held_out.newest),
                            strict=True):  # fmt: skip
        gaps, gammas = (values[f"eval_rmipo/{name}"] for name in ("pmi_gap", "gamma"))
        drawn = sorted(map(tuple, dots.get_offsets().tolist()))
        assert drawn == sorted((gap, gammas[case]) for case, gap in gaps.items())
    assert str(own) == str(read)
    assert rmipo_lite.load_run(run.output_dir, use_cpu=True).figures().keys() == own.keys()


def test_bins_are_quarters_and_what_is_equal_stays_together() -> None:
    right = [1.0, 0.0, 1.0, 1.0]
    after = _columns(40, right=right, chosen=[5.0], rejected=[5.0] * 30 + [1.0] * 10,
                     margin=[1.0], gap=[0.5], gamma=[1.0])  # fmt: skip
    found = figures_of(RunNumbers([], _columns(40, right=[0.0]), after))
    (axes,) = found["accuracy"].figure.axes  # without a PMI gap before, lengths alone
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0 to 0\n(30)", "4 to 4\n(10)"]
    shares = axes.containers[1][0].get_ydata()
    wanted = [sum(right[i % 4] for i in some) / len(some) for some in (range(30), range(30, 40))]
    assert list(shares) == pytest.approx(wanted)


def test_several_sets_are_drawn_together() -> None:
    sides = []
    for shift in (0.0, 1.0):
        columns = {}
        for name in ("easy", "hard"):
            columns[f"eval_{name}_rewards/margins"] = {str(i): i + shift for i in range(6)}
        sides.append(columns)
    found = figures_of(RunNumbers([], *sides))
    assert "12 held-out pairs" in found["rewards"].caption


def test_what_there_is_too_little_of_is_named() -> None:
    few = _columns(7, margin=[1.0], right=[1.0])
    found = figures_of(RunNumbers([], few, few))
    assert list(found) == []
    assert found.missing["rewards"] == (
        "7 held-out pairs have a reward difference before and after, of 8 at least"
    )
    assert "loss_type='rmipo'" in found.missing["gamma"]
    assert "no training step was logged" in found.missing["dynamics"]
    assert "earlier version" in found.missing["efficiency"]
    assert "no rewards: 7 held-out" in str(found)


@pytest.mark.parametrize("values", [[0.0], [0.0, 1e-12], [*range(39), 1e9], [1e30, -1e30]])
def test_values_that_are_all_one_or_far_apart_can_be_drawn(values: list[float]) -> None:
    side = _columns(40, margin=[float(value) for value in values])
    found = figures_of(RunNumbers([], side, side))
    (before, after) = (patch.get_xy() for patch in found["rewards"].figure.axes[0].patches)
    assert len(before) == len(after) < 2 * 45  # bins, whatever the outlier


def test_rows_without_a_pair_have_no_accuracy_by_length() -> None:
    """Unpaired rows: each has one side's length, and the other figures are drawn all the same."""
    side = _columns(20, right=[1.0, 0.0])
    for name, cases in (("chosen", range(10)), ("rejected", range(10, 20))):
        side[f"eval_lengths/{name}"] = {str(i): 5.0 for i in cases}
    found = figures_of(RunNumbers([{"step": 1, "loss": 1.0}], side, side))
    assert list(found) == ["dynamics"]
    assert "no pair has both a verdict and both lengths" in found.missing["accuracy"]


def test_one_that_cannot_be_drawn_takes_no_other_with_it() -> None:
    history = [{"step": s, "loss": 1.0, "rmipo/step_runtime": 1.0} for s in (1, 2)]
    found = figures_of(RunNumbers(history, {}, {}))
    assert list(found) == ["dynamics"]
    assert "can't be drawn: KeyError: 'rmipo/tokens_per_second'" in found.missing["efficiency"]


def test_held_out_curves_of_every_set_are_there() -> None:
    history = [
        {"step": 0, "eval_easy_loss": 2.0, "eval_easy_rewards/margins": 0.1},
        {"step": 1, "loss": 1.0, "rewards/margins": 0.2},
    ]
    axes = figures_of(RunNumbers(history, {}, {}))["dynamics"].figure.axes
    shown = {a.get_title(): [line.get_label() for line in a.lines] for a in axes}
    assert shown["Reward margin"] == ["training", "held out easy"]
    assert shown["Loss"] == ["training", "held out easy"]


def test_the_command_writes_pictures_and_captions(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["figures", str(run.output_dir), "--output_dir", str(tmp_path / "f")]) == 0
    assert {path.name for path in (tmp_path / "f").iterdir()} == {
        "captions.md", *(f"{name}.png" for name in NAMES)
    }  # fmt: skip
    for name in NAMES:
        assert (tmp_path / "f" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    captions = (tmp_path / "f" / "captions.md").read_text(encoding="utf-8")
    assert "![gamma](gamma.png)" in captions
    assert captions.count("After the paper's figure") == len(NAMES)
    assert main(["figures", str(demo.MODEL)]) == 1
    assert f"has no {FILE}, which a run writes at its end" in capsys.readouterr().err


def test_a_damaged_file_is_told(run: Any, tmp_path: Path) -> None:
    text = (run.output_dir / FILE).read_text(encoding="utf-8")
    assert not any(map(math.isnan, json.loads(text)["held_out"]["after"]["eval_loss"].values()))
    for broken in (text[:-20], "[]", '{"history": [1]}'):
        (tmp_path / FILE).write_text(broken, encoding="utf-8")
        with pytest.raises(ValueError, match="is damaged"):
            read_numbers(tmp_path)
