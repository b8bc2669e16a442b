"""One set of held-out pairs, or several by name: every view finds the numbers of each."""

from __future__ import annotations

from rmipo_lite.output import plots
from rmipo_lite.output.held_out import names_of
from rmipo_lite.watch.panel import panel_html
from rmipo_lite.watch.run_progress import RunProgress

_LOGS = [
    {"step": 0, "eval_easy_loss": 1.0, "eval_easy_rewards/margins": 0.1},
    {"step": 0, "eval_very_hard_loss": 2.0, "eval_very_hard_rewards/margins": -0.5},
    {"step": 2, "loss": 0.7, "rewards/margins": 0.2},
    {"step": 4, "eval_easy_loss": 0.5, "eval_easy_rewards/margins": 1.1},
]


def test_names_are_those_of_the_metric_alone() -> None:
    logged = ["loss", "eval_loss", "eval_easy_loss", "eval_easy_runtime", "eval_easy_loss"]
    assert names_of("loss", logged) == [("eval_loss", ""), ("eval_easy_loss", "easy")]
    assert names_of("margins", ["eval_rewards/margins"]) == []


def test_every_set_has_its_curve_and_its_line() -> None:
    drawn = plots.figure(_LOGS)
    (loss,) = [axes for axes in drawn.axes if axes.get_title() == "Loss"]
    labels = [text.get_text() for text in loss.get_legend().get_texts()]
    assert labels == ["training", "held out easy", "held out very_hard"]
    run = RunProgress(max_steps=4)
    for entry in _LOGS[:2] + _LOGS[3:]:
        run.step = int(entry["step"])
        run.add_held_out(entry)
    assert "loss easy 1.0000 → 0.5000, loss very_hard 2.0000" in panel_html(run)
