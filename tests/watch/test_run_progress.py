"""A run's progress in numbers: time left, tokens per second, curves, and words for its state."""

from __future__ import annotations

import pytest

from rmipo_lite.watch import run_progress
from rmipo_lite.watch.run_progress import Phase, RunProgress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(run_progress.time, "monotonic", lambda: now[0])
    return now


def test_pace_counts_from_the_first_step_of_this_call(clock: list[float]) -> None:
    run = RunProgress()
    run.begin(step=40, max_steps=100)  # resumed
    assert run.seconds_left is None
    assert run.headline == "step 40/100"
    clock[0] += 20
    run.step = 50
    assert (run.steps_done, run.seconds, run.seconds_left) == (10, 20.0, 100.0)
    assert run.headline == "step 50/100, 1 min 40 s left"


def test_tokens_per_second_of_the_last_window_without_the_evaluation(clock: list[float]) -> None:
    run = RunProgress()
    run.begin(0, 100)
    clock[0] += 2
    run.add({"loss": 1.0, "num_tokens": 3000})
    assert run.tokens_per_second == 1500
    clock[0] += 5
    run.add_held_out({"eval_loss": 1.0, "eval_runtime": 4.0})
    clock[0] += 1
    run.add({"loss": 1.0, "num_tokens": 5000})
    assert run.tokens_per_second == 1000  # 2000 tokens in 2 of 6 seconds


def test_a_resumed_run_has_no_pace_in_its_first_window(clock: list[float]) -> None:
    """The total it logs holds the tokens of the steps before."""
    run = RunProgress()
    run.begin(40, 100)
    clock[0] += 1
    run.add({"loss": 1.0, "num_tokens": 90_000})
    assert run.tokens_per_second is None
    clock[0] += 1
    run.add({"loss": 1.0, "num_tokens": 91_000})
    assert run.tokens_per_second == 1000


def test_the_words_for_a_state(clock: list[float]) -> None:
    run = RunProgress()
    assert run.headline == "starting"
    run.phase = Phase("evaluating", 40, "pairs")
    assert run.headline == "evaluating, 40 pairs"
    clock[0] += 5
    run.phase.done = 10
    assert run.headline == "evaluating, 10 of 40 pairs, 15 s left"
    run.add_held_out({"eval_loss": 1.0})
    run.begin(0, 10)
    clock[0] += 3
    run.step, run.phase = 5, Phase("looking")
    assert run.headline == "step 5/10, 3 s left, looking"
    run.phase = None
    run.end()
    assert run.is_over
    assert run.headline == "stopped at step 5: 5 steps in 3 s"
    run.begin(5, 10)
    run.step = 10
    run.end()
    assert run.headline == "done: 5 steps in 0 s"
    run.begin(0, 10)
    run.fail("ended with an error")
    assert run.headline == "ended with an error: 0 steps in 0 s"


def test_a_second_training_starts_its_curves_anew() -> None:
    run = RunProgress()
    run.add_held_out({"eval_loss": 3.0})  # before training: belongs to the run that comes
    run.begin(0, 2)
    run.step = 1
    run.add({"loss": 2.0})
    assert run.series("loss") == [(1.0, 2.0)]
    assert run.series("loss", held_out=True) == [(0.0, 3.0)]
    run.begin(0, 2)
    assert run.series("loss") == run.series("loss", held_out=True) == []


def test_curves_hold_finite_numbers_only() -> None:
    run = RunProgress()
    run.begin(0, 3)
    for step, loss in enumerate((1.0, float("nan"), float("inf"), 0.5)):
        run.step = step
        run.add({"loss": loss})
    assert run.series("loss") == [(0.0, 1.0), (3.0, 0.5)]
