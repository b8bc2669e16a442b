"""The notebooks: their form as stored, and (-m notebook) that they run, also where little is."""

from __future__ import annotations

import itertools
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from tests.notebook_tools import NOTEBOOKS, script

NAMES = [path.stem for path in NOTEBOOKS]
MOST_LINES = 15  # of code in a cell
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)


def cells(path: Path, kind: str) -> list[dict[str, Any]]:
    stored = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in stored if cell["cell_type"] == kind]


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def texts(cell: dict[str, Any]) -> list[str]:
    """What a reader sees of the outputs as text or HTML."""
    found = []
    for output in cell["outputs"]:
        found.append("".join(output.get("text", "")))
        for kind, data in output.get("data", {}).items():
            if kind.startswith("text/"):
                found.append(re.sub("base64,[A-Za-z0-9+/=]+", "", "".join(data)))
    return found


def test_there_are_ten() -> None:
    assert NAMES == [
        "00_quickstart_colab", "01_preference_data", "02_logps_and_pmi", "03_loss_and_gradient",
        "04_cuda_extension", "05_train_qlora", "06_evaluate_and_compare", "07_compare_methods",
        "08_no_tuning", "09_export_and_judge",
    ]  # fmt: skip


@every_notebook
def test_cells_are_short_and_explained(path: Path) -> None:
    stored = json.loads(path.read_text(encoding="utf-8"))["cells"]
    for before, cell in itertools.pairwise(stored):
        if cell["cell_type"] == "code":
            assert before["cell_type"] == "markdown", source(cell)
            assert len(source(cell).splitlines()) <= MOST_LINES, source(cell)


@every_notebook
def test_headings_are_numbered_and_versions_come_first(path: Path) -> None:
    text = "\n".join(source(cell) for cell in cells(path, "markdown"))
    assert text.startswith(f"# {path.stem[:2]} · ")
    headings = re.findall(r"^## (.*)$", text, re.M)
    assert [heading.split(".")[0] for heading in headings] == [
        str(number) for number in range(1, len(headings) + 1)
    ]
    assert headings[-1].endswith("What to take away")
    assert "rmipo_lite.info().versions" in source(cells(path, "code")[0])


@every_notebook
def test_names_of_other_notebooks_are_right(path: Path) -> None:
    text = "\n".join(source(cell) for cell in cells(path, "markdown"))
    assert set(re.findall(r"\*\*(0\d_\w+)\*\*", text)) <= set(NAMES)


@every_notebook
def test_outputs_are_stored_clean(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert set(notebook["metadata"]) <= {"kernelspec", "language_info", "colab", "accelerator"}
    assert any(cell["outputs"] for cell in cells(path, "code"))
    for cell in cells(path, "code"):
        assert cell["execution_count"] is None
        assert not any(output["output_type"] == "error" for output in cell["outputs"])
        assert not any(output.get("name") == "stderr" for output in cell["outputs"])
        for text in [source(cell), *texts(cell)]:
            assert not re.search(r"(?<![\w.])/(home|root|tmp|work|Users|usr|opt)/", text), text
            assert not re.search(r"\w*Warning: ", text), text


def test_the_quickstart_has_five_steps_and_one_address() -> None:
    path = NOTEBOOKS[0]
    headings = re.findall(r"^## \d\. (.*)$", "\n".join(map(source, cells(path, "markdown"))), re.M)
    assert headings[:5] == ["Install", "Choose a model and pairs", "Train", "Compare", "Save"]
    assert "\n".join(map(source, cells(path, "code"))).count("https://github.com/") == 1


# ---- the script that makes the outputs ------------------------------------------------------


@pytest.fixture(scope="module")
def run() -> Any:
    for module in ("nbclient", "nbformat", "ipykernel"):
        pytest.importorskip(
            module, reason=f"{module} isn't installed: pip install -e '.[notebooks]'"
        )
    return script("run")


def test_what_is_stored_names_no_machine_and_no_time(run: Any) -> None:
    import nbformat

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1", execution_count=7)])
    notebook.metadata = {"accelerator": "GPU", "kernelspec": {"name": "mine"}, "widgets": {}}
    cell = notebook.cells[0]
    cell.metadata = {"execution": {"iopub.status.busy": "2026"}}
    cell.outputs = [
        nbformat.v4.new_output("execute_result", {"text/plain": "1"}, execution_count=7),
        nbformat.v4.new_output("stream", name="stderr", text="a warning"),
    ]
    assert run.complaints(notebook) == ["cell 0: a warning"]
    tidied = run.tidied(notebook)
    assert tidied.metadata["accelerator"] == "GPU"
    assert tidied.metadata["kernelspec"]["name"] == "python3"
    assert "widgets" not in tidied.metadata
    assert (cell.metadata, cell.execution_count, cell.outputs[0].execution_count) == (
        {},
        None,
        None,
    )


def test_a_number_without_a_notebook_is_refused(run: Any) -> None:
    assert [path.stem[:2] for path in run.notebooks(["02", "05"])] == ["02", "05"]
    with pytest.raises(SystemExit, match="no notebook begins with 9"):
        run.notebooks(["9"])


def _shown(notebook: Any) -> str:
    return "\n".join("\n".join(texts(cell)) for cell in notebook.cells if "outputs" in cell)


@pytest.mark.notebook
@every_notebook
def test_it_runs_from_top_to_bottom_without_a_warning(
    path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run.make_caches()
    assert run.complaints(run.execute(path)) == []


@pytest.mark.notebook
@pytest.mark.filterwarnings("default")
def test_the_quickstart_runs_without_widgets_on_a_dumb_terminal(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where ipywidgets is missing tqdm and others fall back; nothing of ours may need it."""
    (tmp_path / "ipywidgets.py").write_text("raise ImportError('planted: no ipywidgets here')\n")
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    )
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shown = _shown(run.execute(NOTEBOOKS[0]))
    (steps,) = set(re.findall(r"done: (\d+) steps in", shown))
    assert f'<progress value="{steps}" max="{steps}"' in shown
    assert "\x1b[" not in shown
