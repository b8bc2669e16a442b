"""Each symptom is provoked by a chart that has it, and a healthy chart has none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rmipo_lite.config import RMiPOConfig
from rmipo_lite.data.report import DataReport
from rmipo_lite.watch.chart import Chart
from rmipo_lite.watch.symptoms import SYMPTOMS, examine

_STEPS = 100


@pytest.fixture
def args(tmp_path) -> RMiPOConfig:
    return RMiPOConfig(str(tmp_path), use_cpu=True, learning_rate=2e-5)


def _line(step: int, **changed: float) -> dict[str, float]:
    progress = step / _STEPS
    return {
        "step": step, "loss": 1.0 - 0.2 * progress, "grad_norm": 1.3,
        "logps/chosen": -1.5 - 0.05 * progress, "rmipo/gamma_at_max": 0.4,
        "rmipo/gamma_at_min": 0.05, "rmipo/pmi_undefined": 0.0, **changed,
    }  # fmt: skip


def _evaluation(step: int, **changed: float) -> dict[str, float]:
    progress = step / _STEPS
    numbers = {
        "loss": 1.0 - 0.2 * progress, "rewards/accuracies": 0.6 + 0.1 * progress,
        "rewards/margins": 0.1 + 0.5 * progress, "logps/chosen": -1.5 - 0.05 * progress,
        "logps/rejected": -1.6 - 0.3 * progress, "rmipo/gamma": 1.2,
        "completions/mean_length": 40.0 + 5 * progress, "completions/clipped_ratio": 0.125,
        "completions/repetition": 0.02,
    } | changed  # fmt: skip
    return {"step": step, **{f"eval_{name}": value for name, value in numbers.items()}}


def _healthy(args: RMiPOConfig) -> Chart:
    return Chart(
        args,
        logs=[_line(step) for step in range(10, _STEPS + 1, 10)],
        held_out=[_evaluation(step) for step in (0, 50, _STEPS)],
        pairs=100,
        max_steps=_STEPS,
        report=DataReport(kept=100, chosen_longer_pairs=55),
        errors=dict.fromkeys(_evaluation(0), 1e-4),
        answers=8,
    )


def _with_evaluations(chart: Chart, before: dict[str, float], after: dict[str, float]) -> Chart:
    return replace(chart, held_out=[_evaluation(0, **before), _evaluation(_STEPS, **after)])


def _names(chart: Chart) -> list[str]:
    return [finding.name for finding in examine(chart)]


def test_a_healthy_run_is_silent(args: RMiPOConfig) -> None:
    assert _names(_healthy(args)) == []


def test_an_empty_chart_is_silent(args: RMiPOConfig) -> None:
    assert _names(Chart(args)) == []


# name -> (held-out numbers before, after, words that must stand in the finding)
_HELD_OUT: dict[str, tuple[dict[str, float], dict[str, float], str]] = {
    "swapped_labels": (
        {"rewards/accuracies": 0.35},
        {"rewards/accuracies": 0.5},
        "the rejected side likelier in 65% (55 to 74%) of 100",
    ),
    "easy_pairs": (
        {"rewards/accuracies": 0.97},
        {"rewards/accuracies": 0.97},
        "prefers the chosen side in 97% (92 to 99%) of 100",
    ),
    "chosen_collapsing": (
        {"logps/chosen": -1.0},
        {"logps/chosen": -4.5, "logps/rejected": -6.0},
        "held-out chosen responses became less likely, by 3.5 nats per token",
    ),
    "both_rewards_falling": (
        {"logps/chosen": -1.5, "logps/rejected": -1.6},
        {"logps/chosen": -1.9, "logps/rejected": -2.4},
        "chosen by 0.40, rejected by 0.80",
    ),
    "learning_rate_high": ({"loss": 1.0}, {"loss": 1.3}, "loss 1.000 -> 1.300"),
    "overshooting": (
        {"rewards/margins": 0.5, "logps/rejected": -1.6},
        {"rewards/margins": 5.0, "logps/rejected": -4.0},
        "from 0.5 to 5.0, far past gamma (1.2), and the rejected side lost 2.4",
    ),
    "learning_rate_low": (
        {"logps/chosen": -1.5, "logps/rejected": -1.6},
        {"logps/chosen": -1.501, "logps/rejected": -1.602},
        "100 steps moved the held-out log-probs by 0.002",
    ),
    "repetition": (
        {},
        {"completions/repetition": 0.6},
        "60% of their phrases of four tokens",
    ),
    "length_runaway": (
        {},
        {"completions/mean_length": 90.0, "completions/clipped_ratio": 0.75},
        "90 tokens (+- 0) in the mean of 8 and 75% without an end, at the start 40 and 12%",
    ),
    "answers_vanish": (
        {},
        {"completions/mean_length": 1.5},
        "shrink to nothing: 1.5 tokens in the mean, at the start 40",
    ),
    "never_ends": (
        {"completions/clipped_ratio": 1.0},
        {},
        "before any training 100% (68 to 100%) of the model's answers don't end",
    ),
}


@pytest.mark.parametrize("name", _HELD_OUT)
def test_what_an_evaluation_shows(name: str, args: RMiPOConfig) -> None:
    before, after, words = _HELD_OUT[name]
    found = examine(_with_evaluations(_healthy(args), before, after))
    assert [finding.name for finding in found] == [name]
    assert words in found[0].text
    assert found[0].advice


# name -> (numbers of every log line, words)
_TRAINING: dict[str, tuple[dict[str, float], str]] = {
    "gamma_pinned": ({"rmipo/gamma_at_max": 0.9}, "gamma_max (1.6) for 90% of the pairs"),
    "pmi_undefined": ({"rmipo/pmi_undefined": 0.3}, "30% of the pairs have a response of one"),
    "loss_constant": ({"loss": 0.5}, "0.5 in all of 10 log lines, the gradient's norm is 1.3"),
}


@pytest.mark.parametrize("name", _TRAINING)
def test_what_training_shows(name: str, args: RMiPOConfig) -> None:
    changed, words = _TRAINING[name]
    logs = [_line(step, **changed) for step in range(10, _STEPS + 1, 10)]
    found = examine(replace(_healthy(args), logs=logs))
    assert [finding.name for finding in found] == [name]
    assert words in found[0].text


def test_gamma_at_its_other_end(args: RMiPOConfig) -> None:
    logs = [_line(10, **{"rmipo/gamma_at_min": 0.95})]
    (found,) = examine(replace(_healthy(args), logs=logs))
    assert "gamma_min (0.3) for 95%" in found.text
    constant = replace(_healthy(args), logs=logs)
    args.gamma_min = args.gamma_max
    assert _names(constant) == []  # a constant gamma is what was asked for


def test_the_length_of_the_chosen_side(args: RMiPOConfig) -> None:
    report = DataReport(kept=100, chosen_longer_pairs=70)
    (found,) = examine(replace(_healthy(args), report=report))
    assert found.name == "chosen_longer"
    assert "70% (60 to 78%) of the pairs" in found.text
    few = replace(_healthy(args), report=DataReport(kept=12, chosen_longer_pairs=8))
    assert _names(few) == []


def test_a_collapse_shows_in_training_too(args: RMiPOConfig) -> None:
    logs = [_line(step, **{"logps/chosen": -1.0 - step / 50}) for step in range(10, 101, 10)]
    (found,) = examine(replace(_healthy(args), logs=logs, held_out=[]))
    assert found.name == "chosen_collapsing"
    assert "the training chosen responses" in found.text


def test_a_model_that_is_its_own_reference_prefers_no_side(tmp_path: Path) -> None:
    args = RMiPOConfig(str(tmp_path), loss_type="dpo")
    chart = _with_evaluations(
        _healthy(args),
        {"rewards/accuracies": 0.0, "loss": 0.69},
        {"rewards/accuracies": 0.6, "loss": 0.6},
    )
    assert _names(chart) == []


def test_what_is_said_of_length_is_the_methods(tmp_path: Path) -> None:
    report = DataReport(kept=100, chosen_longer_pairs=70)
    args = RMiPOConfig(str(tmp_path), loss_type="dpo")
    (found,) = examine(replace(_healthy(args), report=report))
    assert found.name == "chosen_longer"
    assert "r_dpo" in found.advice


@pytest.mark.parametrize(
    "seen",
    [
        [-2.222, -2.267, -2.549, -2.415, -3.127, -2.629],  # lines of five pairs, Gemma 3 270M
        [-2.156, -2.4, -2.913, -2.079, -2.604, -2.995],  # of ten
    ],
)
def test_other_pairs_are_no_collapse(seen: list[float], args: RMiPOConfig) -> None:
    logs = [_line(5 * n, **{"logps/chosen": value}) for n, value in enumerate(seen, start=1)]
    assert _names(replace(_healthy(args), logs=logs, held_out=[])) == []


def test_accuracy_that_falls_is_a_rate_too_high(args: RMiPOConfig) -> None:
    chart = _with_evaluations(
        _healthy(args), {"rewards/accuracies": 0.9}, {"rewards/accuracies": 0.7, "loss": 0.95}
    )
    assert _names(chart) == ["learning_rate_high"]


@pytest.mark.parametrize("scaled", [False, True])
def test_an_overshoot_is_measured_from_gamma(scaled: bool, args: RMiPOConfig) -> None:
    """Margin 4.3: 3.1 past a gamma of 1.2, and 1.9 past the same gamma times beta 2."""
    args.gamma_scaled_by_beta = scaled
    chart = _with_evaluations(_healthy(args), {}, {"rewards/margins": 4.3})
    assert _names(chart) == ([] if scaled else ["overshooting"])


_CHANGES = {
    name: numbers[1]
    for name, numbers in _HELD_OUT.items()
    if name not in ("swapped_labels", "easy_pairs", "learning_rate_low", "never_ends")
}


@pytest.mark.parametrize("name", _CHANGES)
def test_what_chance_explains_is_no_finding(name: str, args: RMiPOConfig) -> None:
    """The same numbers with standard errors as large as they are, or of nobody's knowing."""
    before, after, _ = _HELD_OUT[name]
    chart = _with_evaluations(_healthy(args), before, after)
    wide = dict.fromkeys(chart.held_out[-1], 50.0)
    assert _names(replace(chart, errors=wide)) == []
    assert _names(replace(chart, errors={})) == []


def test_one_pair_of_twenty_is_no_trend(args: RMiPOConfig) -> None:
    """Accuracy 0.70 to 0.55 with a standard error of 0.09; 13 of 20 pairs lost before training."""
    errors = {"eval_rewards/accuracies": 0.09}
    fell = _with_evaluations(
        _healthy(args), {"rewards/accuracies": 0.70}, {"rewards/accuracies": 0.55}
    )
    assert _names(replace(fell, pairs=20, errors=errors)) == []
    even = _with_evaluations(_healthy(args), {"rewards/accuracies": 0.35}, {})
    assert _names(replace(even, pairs=20, errors={})) == []
    assert _names(replace(even, pairs=200, errors={})) == ["swapped_labels"]


def test_two_answers_are_no_habit(args: RMiPOConfig) -> None:
    for name in ("repetition", "length_runaway", "answers_vanish", "never_ends"):
        before, after, _ = _HELD_OUT[name]
        chart = _with_evaluations(_healthy(args), before, after)
        assert _names(replace(chart, answers=2)) == []


def test_a_few_answers_that_say_the_same_again_and_again(args: RMiPOConfig) -> None:
    """Their share of all phrases is small, and a reader sees them all the same."""
    some = {"completions/repetition": 0.12, "completions/repetitive_ratio": 0.25}
    chart = _with_evaluations(_healthy(args), {"completions/repetitive_ratio": 0.0}, some)
    (found,) = examine(chart)
    assert (found.name, found.level) == ("repetition", "note")
    assert "2 of 8 answers say the same again and again, at the start 0" in found.text
    was_so = _with_evaluations(_healthy(args), some, some)
    assert _names(was_so) == []


def test_few_pairs_are_not_judged_by_shares(args: RMiPOConfig) -> None:
    chart = _with_evaluations(_healthy(args), {"rewards/accuracies": 0.3}, {"loss": 1.5})
    assert _names(replace(chart, pairs=10)) == []


def test_low_rates_are_judged_late(args: RMiPOConfig) -> None:
    same: dict[str, float] = {"logps/chosen": -1.5, "logps/rejected": -1.6}
    chart = replace(
        _healthy(args), held_out=[_evaluation(0, **same), _evaluation(30, **same)], logs=[_line(30)]
    )
    assert _names(chart) == []
    assert _names(replace(chart, max_steps=60)) == ["learning_rate_low"]


def test_another_end_than_the_models_own_is_noted(args: RMiPOConfig) -> None:
    (found,) = examine(replace(_healthy(args), ends=("<|im_end|>", "<|endoftext|>")))
    assert (found.name, found.level) == ("ends_differ", "note")
    assert "end with <|im_end|> in training, and the model itself stops at <|endoftext|>" in (
        found.text
    )


def test_what_would_teach_a_base_model_to_stop(args: RMiPOConfig) -> None:
    chart = _with_evaluations(_healthy(args), {"completions/clipped_ratio": 1.0}, {})
    assert "end_anchor teaches it here" in examine(chart)[0].advice
    assert "end_anchor can't" in examine(replace(chart, is_anchored=False))[0].advice
    args.end_anchor = 0.0
    assert "end_anchor=0.1 would" in examine(chart)[0].advice


def test_every_symptom_is_provoked_here(args: RMiPOConfig) -> None:
    provoked: set[Any] = {*_HELD_OUT, *_TRAINING, "chosen_longer", "ends_differ"}
    assert provoked == {symptom.__name__ for symptom in SYMPTOMS}
