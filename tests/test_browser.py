"""Notebooks in JupyterLab and reports, in a real Chromium: what a reader sees (-m notebook)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.notebook_tools import script

pytestmark = pytest.mark.notebook
TEXT_CONTRAST = 4.5  # WCAG 2, level AA, for text

# The colours of a page as the browser resolved them: (text, background).
_COLOURS = """() => {
    const style = getComputedStyle(document.body);
    return [style.color, style.backgroundColor];
}"""


@pytest.fixture(scope="module")
def browser() -> Any:
    for name in ("playwright", "jupyterlab", "ipywidgets"):
        pytest.importorskip(name, reason=f"{name} isn't installed; '.[notebooks,browser]' has it")
    tools = script("browser")
    if tools.chromium_path() is None:
        pytest.skip("Chromium isn't installed (Debian: apt-get install chromium)")
    script("run").make_caches()
    return tools


@pytest.fixture(scope="module")
def lab(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    folder = tmp_path_factory.mktemp("lab")
    with browser.jupyter_lab(folder) as address:
        yield folder, address


def outputs(page: Any, kind: str) -> int:
    return int(page.locator(f".jp-OutputArea-output {kind}").count())


def run_in_lab(browser: Any, lab: tuple[Path, str], name: str, page: Any) -> None:
    """Run a notebook to its end; its first panel must move within its place."""
    folder, address = lab
    notebook = browser.copied(name, folder)
    browser.open_notebook(page, address, name)
    browser.run_all(page)
    browser.wait_for_step(page, 5)
    panels = outputs(page, "progress")
    first = page.locator("progress").first.evaluate("bar => bar.value")
    browser.wait_for_step(page, int(first) + 5)
    assert outputs(page, "progress") == panels == 1, "a second panel was drawn for the same run"
    browser.wait_until_run(page, browser.code_cells(notebook))
    for kind in ("stderr", "error"):
        assert page.locator(f'[data-mime-type="application/vnd.jupyter.{kind}"]').count() == 0


def overflow(page: Any) -> int:
    """How many pixels the page is wider than its window."""
    return int(page.evaluate("document.documentElement.scrollWidth - innerWidth"))


def test_the_quickstart(browser: Any, lab: tuple[Path, str]) -> None:
    with browser.browser_page(viewport=browser.DESKTOP) as page:
        run_in_lab(browser, lab, "00_quickstart_colab", page)
        panel = page.locator(".jp-OutputArea-output", has=page.locator("progress"))
        text = panel.inner_text()
        assert "done: 89 steps in" in text
        assert "evaluating" not in text
        for name in ("reward accuracy", "reward margin", "gamma", "PMI gap", "tokens/s", "memory"):
            assert name in text
        curves = panel.locator("img")
        assert curves.count() == 5
        drawn = "image => image.complete && image.naturalWidth > 50"
        assert all(curve.evaluate(drawn) for curve in curves.all())
        box = panel.bounding_box()
        assert box["height"] < 260, "the panel should be compact"
        assert outputs(page, "svg") >= 6  # the result's curves
        assert outputs(page, "table") >= 4  # data report, panel, metrics, samples


def test_the_training_notebook(browser: Any, lab: tuple[Path, str]) -> None:
    with browser.browser_page(viewport=browser.DESKTOP) as page:
        run_in_lab(browser, lab, "05_train_qlora", page)
        shown = page.locator(".jp-Notebook").inner_text()
        assert outputs(page, "progress") == 6  # one for each run
        assert "stopped at step 26: 26 steps in" in shown
        assert "equal, bit for bit: True" in shown


@pytest.mark.parametrize("width", ["DESKTOP", "PHONE"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_on_a_screen_and_a_phone(
    browser: Any, lab: tuple[Path, str], width: str, scheme: str
) -> None:
    report = lab[0] / "quickstart" / "run.html"
    assert report.is_file(), "the quickstart writes it"
    viewport = getattr(browser, width)
    requests: list[str] = []
    with browser.browser_page(viewport=viewport, color_scheme=scheme) as page:
        page.on("request", lambda request: requests.append(request.url))
        page.goto(report.as_uri())
        assert overflow(page) <= 0
        assert page.locator("h2").count() >= 5
        for curve in page.locator("svg").all():
            box = curve.bounding_box()
            assert 200 < box["width"] <= viewport["width"]
        text, back = (light(colour) for colour in page.evaluate(_COLOURS))
    assert (text > back) == (scheme == "dark")
    assert (max(text, back) + 0.05) / (min(text, back) + 0.05) > TEXT_CONTRAST
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []


def light(colour: str) -> float:
    """Relative luminance of `rgb(r, g, b)`, as WCAG 2 defines it."""
    channels = [int(part) / 255 for part in colour.strip("rgba()").split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
