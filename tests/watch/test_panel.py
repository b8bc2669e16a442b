"""The panel of a notebook: what is in it, drawn at any time, and that it never ends a run."""

from __future__ import annotations

import base64
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from rmipo_lite.watch import panel, progress
from rmipo_lite.watch.panel import NotebookPanel, panel_html
from rmipo_lite.watch.progress import ProgressDisplay, show_progress
from rmipo_lite.watch.run_progress import RunProgress
from tests.kit import make_trainer

LINE = {
    "loss": 0.5, "rewards/accuracies": 0.75, "rewards/margins": 1.25, "rmipo/gamma": 0.9,
    "rmipo/gamma_std": 0.2, "rmipo/pmi_gap": 0.4, "rmipo/pmi_gap_std": 0.3, "num_tokens": 10.0,
}  # fmt: skip


def a_run(lines: int = 3, **changed: Any) -> RunProgress:
    run = RunProgress()
    run.begin(0, 200)
    for step in range(1, lines + 1):
        run.step = step
        run.add({**LINE, **changed, "loss": 1 / step})
    return run


def curves(page: str) -> list[str]:
    found = re.findall(r"base64,([A-Za-z0-9+/=]+)", page)
    return [base64.b64decode(image).decode() for image in found]


def test_everything_that_is_asked_of_it() -> None:
    run = a_run()
    run.memory, run.data_dropped = (3 * 2**30, 8 * 2**30), 4
    run.add_held_out({"eval_rewards/accuracies": 0.5, "eval_loss": 1.5})
    run.add_held_out({"eval_rewards/accuracies": 0.9, "eval_loss": 0.25})
    page = panel_html(run)
    for text in (
        "step 3/200", "s left", "0.3333", "75%", "+1.250", "0.90 ± 0.20", "+0.40 ± 0.30",
        "3.0 of 8 GiB", "0 in training, 4 before", "50.0% → 90.0%", "1.5000 → 0.2500",
        '<progress value="3" max="200"',
    ):  # fmt: skip
        assert text in page, text
    assert len(curves(page)) == 5  # loss, accuracy, margin, gamma, PMI gap


def test_before_the_first_number_and_for_a_loss_without_gamma() -> None:
    assert "starting" in panel_html(RunProgress())
    simpo = RunProgress()
    simpo.begin(0, 10)
    simpo.add({"loss": 1.0})
    page = panel_html(simpo)
    assert "gamma" not in page
    assert curves(page) == []  # one point is no curve


def test_text_is_escaped() -> None:
    run = a_run()
    run.fail("<script>")
    assert "<script>" not in panel_html(run)


def test_a_curve_stays_small_and_inside_its_image() -> None:
    """A run of a week must not send a page of megabytes twice a second."""
    short, long = (panel_html(a_run(lines)) for lines in (60, 20_000))
    assert len(long) < 1.1 * len(short)
    for svg in curves(long):
        (points,) = re.findall(r'points="([^"]+)"', svg)
        places = [tuple(map(float, place.split(","))) for place in points.split()]
        assert places[0][0] == 3
        assert places[-1][0] == 96 - 3
        assert all(0 < x < 96 and 0 < y < 26 for x, y in places)


# ---- on the page ----------------------------------------------------------------------------


class Page:
    """Stands in for IPython's display: what is shown where."""

    def __init__(self) -> None:
        self.shown: list[dict[str, str]] = []
        self.updates = 0

    def display(self, bundle: dict[str, str], raw: bool, display_id: bool) -> Any:
        assert raw
        assert display_id
        self.shown.append(bundle)
        place = len(self.shown) - 1

        def update(bundle: dict[str, str], raw: bool) -> None:
            self.updates += 1
            self.shown[place] = bundle

        return SimpleNamespace(update=update)


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Page:
    shown = Page()
    display = ModuleType("IPython.display")
    display.display = shown.display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return shown


def test_a_run_in_a_notebook_is_one_panel_that_updates(
    tmp_path: Path, page: Page, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "in_notebook", lambda: True)
    monkeypatch.setattr(panel, "REDRAW_SECONDS", 0.0)
    trainer = make_trainer(tmp_path, max_steps=3, save_strategy="no", eval_strategy="steps",
                           eval_steps=2, logging_steps=1)  # fmt: skip
    show_progress(trainer)
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    first, last = page.shown  # the place before training is left empty when training begins
    assert first == {"text/html": "", "text/plain": ""}
    assert "done: 3 steps in" in last["text/html"]
    assert "evaluating" not in last["text/html"]
    assert last["text/plain"].startswith("done: 3 steps in")
    assert last["text/html"].count("→") == 1  # held-out loss, before and after
    assert page.updates > 3
    assert capsys.readouterr().out == ""


def test_it_is_redrawn_at_most_so_often(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    view, run = NotebookPanel(), a_run()
    view.start(run)
    for _ in range(100):
        view.update(run)
    assert page.updates == 0
    view.close(run)
    assert page.updates == 1


def test_a_page_that_fails_is_told_once_and_training_goes_on(
    page: Page, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("the page is gone")

    monkeypatch.setattr(sys.modules["IPython.display"], "display", gone)
    view, run = NotebookPanel(), a_run()
    for _ in range(3):
        view.start(run)
        view.close(run)
    assert capsys.readouterr().out.splitlines() == [
        "The panel is no longer drawn (ConnectionError: the page is gone); training goes on"
    ]


def test_a_run_that_raises_says_so_in_its_panel(page: Page) -> None:
    display = ProgressDisplay()
    display._chosen = NotebookPanel()
    display.run.begin(0, 10)
    display._view.start(display.run)
    with pytest.raises(RuntimeError), display:
        raise RuntimeError("planted")
    assert "ended with an error: 0 steps" in page.shown[-1]["text/html"]
