"""Opens notebooks and reports in a real browser, and takes the README's pictures.

    python notebooks/browser.py           # docs/live_view.png, report.png, and three more

JupyterLab is started on a copy of a notebook, headless Chromium (the system's own, driven by
Playwright) opens it, runs all cells and waits for the kernel. `tests/test_browser.py` does so too.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
DOCS = FOLDER.parent / "docs"
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
_START_S, _RUN_S = 90, 240
# Without these the browser looks for servers of its maker at every start.
_CHROMIUM_FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


def chromium_path() -> str | None:
    """The system's Chromium, None where there is none."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


@contextlib.contextmanager
def browser_page(**options: Any) -> Iterator[Any]:
    """A page of a headless Chromium; the options are those of a Playwright context."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path(), args=_CHROMIUM_FLAGS)
        try:
            yield browser.new_context(**options).new_page()
        finally:
            browser.close()


@contextlib.contextmanager
def jupyter_lab(folder: Path) -> Iterator[str]:
    """JupyterLab over a folder, on this machine alone and without a token; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}",
        "--ServerApp.ip=127.0.0.1", "--IdentityProvider.token=", "--ServerApp.port_retries=0",
        f"--ServerApp.root_dir={folder}",
    ]  # fmt: skip
    # The user's own Jupyter (a theme, an open workspace) stays out of the picture.
    own = {
        "JUPYTER_CONFIG_DIR": str(folder / ".config"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / ".workspaces"),
        "JUPYTERLAB_SETTINGS_DIR": str(_settings(folder / ".settings")),
    }
    server = subprocess.Popen(
        command,
        env={**os.environ, **own},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        address = f"http://127.0.0.1:{port}"
        _wait_for(f"{address}/api", server)
        yield address
    finally:
        server.terminate()
        server.wait(timeout=30)


def _settings(folder: Path) -> Path:
    """Settings of JupyterLab: no question about news, and every cell on the page."""
    for name, values in (
        ("apputils-extension/notification", {"fetchNews": "false", "checkForUpdates": False}),
        ("notebook-extension/tracker", {"windowingMode": "none"}),
    ):
        path = folder / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(values), encoding="utf-8")
    return folder


def _wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"JupyterLab ended with code {server.returncode}")
        with contextlib.suppress(OSError):
            urllib.request.urlopen(url, timeout=2).read()
            return
        time.sleep(0.3)
    raise TimeoutError(f"JupyterLab didn't answer within {_START_S} s")


def copied(name: str, folder: Path) -> Path:
    """A copy of a notebook without its outputs, so that all that is seen was made here."""
    notebook = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = []
    path = folder / f"{name}.ipynb"
    path.write_text(json.dumps(notebook), encoding="utf-8")
    return path


def open_notebook(page: Any, address: str, name: str) -> None:
    """Open a notebook alone on the page, and wait until its kernel is idle."""
    page.goto(f"{address}/doc/tree/{name}.ipynb")
    # The status bar names the kernel too; until it has one, a cell that runs asks which to take.
    page.get_by_text("| Idle").wait_for(timeout=_START_S * 1000)


def run_all(page: Any) -> None:
    """Run every cell by the menu, as a reader would; returns at once."""
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()


def wait_until_run(page: Any, cells: int) -> None:
    """Wait until the last code cell has a number: the kernel has answered them all."""
    page.wait_for_function(
        """count => {
            const prompts = [...document.querySelectorAll('.jp-InputArea-prompt')];
            return prompts.some(p => p.textContent.trim() === `[${count}]:`);
        }""",
        arg=cells,
        timeout=_RUN_S * 1000,
    )


def wait_for_step(page: Any, step: int) -> None:
    """Wait until the live view has come to a step."""
    page.wait_for_function(
        "step => [...document.querySelectorAll('progress')].some(p => p.value >= step)",
        arg=step,
        timeout=_RUN_S * 1000,
    )


def code_cells(path: Path) -> int:
    """How many cells of a notebook run."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return sum(cell["cell_type"] == "code" for cell in cells)


def write_looks(folder: Path) -> dict[str, Path]:
    """Pages of what is there before, during and after a run, by the picture's name."""
    from transformers import LlamaConfig

    import rmipo_lite
    from rmipo_lite import demo
    from rmipo_lite.demo.data import swapped
    from rmipo_lite.output import page, plots

    rows = demo.easy_rows()
    wrong = set(random.Random(1).sample(range(len(rows)), 80))
    flawed = [swapped(row) if i in wrong else row for i, row in enumerate(rows)]
    look = rmipo_lite.inspect(flawed, demo.MODEL)
    shape = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192,
        name_or_path="the shape of Llama-3-8B",
    )  # fmt: skip
    estimate = rmipo_lite.estimate(shape, gpu="RTX 3060 12GB")
    tables = [("Memory and time", estimate._repr_html_()), ("", plots.svg(estimate.plot()))]
    ruined = rmipo_lite.train(
        demo.MODEL, demo.length_biased_rows(), output_dir=folder / "wordy", learning_rate=3e-3,
        max_steps=90, logging_steps=5, length_balance="off", end_anchor=0.0, sft_weight=0.0,
    )  # fmt: skip
    return {
        "inspect": look.report(folder / "inspect.html"),
        "estimate": page.write_report(
            folder / "estimate.html", page.html_page("Before a run", "Nothing is loaded.", tables)
        ),
        "findings": ruined.report(folder / "findings.html"),
    }


def main() -> int:
    """Take the pictures."""
    DOCS.mkdir(exist_ok=True)
    name = "00_quickstart_colab"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        notebook = copied(name, folder)
        with jupyter_lab(folder) as address, browser_page(viewport=DESKTOP) as page:
            open_notebook(page, address, name)
            run_all(page)
            wait_for_step(page, 45)
            page.locator(".jp-Cell", has=page.locator("progress")).screenshot(
                path=DOCS / "live_view.png"
            )
            wait_until_run(page, code_cells(notebook))
        with browser_page(viewport={"width": 1000, "height": 1250}) as page:
            page.goto((folder / "quickstart" / "run.html").as_uri())
            page.screenshot(path=DOCS / "report.png")
        looks = write_looks(folder)
        for picture, height in (("inspect", 1215), ("estimate", 1460), ("findings", 650)):
            with browser_page(viewport={"width": 1000, "height": height}) as page:
                page.goto(looks[picture].as_uri())
                page.screenshot(path=DOCS / f"{picture}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
