"""Runs the notebooks from top to bottom, each in a fresh kernel.

    python notebooks/run.py               # all of them; writes the outputs into the files
    python notebooks/run.py 02 05         # these
    python notebooks/run.py --check       # writes nothing: do they still run, without a warning?

Outputs are kept in the files, so that they can be read without running anything; execution counts
and the machine's own metadata are not.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent
CELL_TIMEOUT_S = 300
_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def notebooks(numbers: list[str]) -> list[Path]:
    """The notebooks whose names begin with one of `numbers`; all of them for none."""
    every = sorted(FOLDER.glob("[0-9]*.ipynb"))
    chosen = [path for path in every if not numbers or path.name.startswith(tuple(numbers))]
    if not chosen:
        raise SystemExit(f"no notebook begins with {' or '.join(numbers)}; there are "
                         + ", ".join(path.stem for path in every))  # fmt: skip
    return chosen


def make_caches() -> None:
    """Do what is done once on a machine and says so, which would stand in the first notebook."""
    import matplotlib.font_manager  # noqa: F401  writes a cache of the fonts

    import rmipo_lite

    rmipo_lite.info()  # compiles the kernels


def execute(path: Path) -> nbformat.NotebookNode:
    """The notebook with fresh outputs. Raises nbclient's CellExecutionError where a cell fails.

    It runs in an empty folder that has `../benchmarks` beside it, as the notebooks' own has: what
    a notebook writes is thrown away.
    """
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / FOLDER.name
        folder.mkdir()
        shutil.copytree(FOLDER.parent / "benchmarks", folder.parent / "benchmarks")
        NotebookClient(
            notebook,
            timeout=CELL_TIMEOUT_S,
            kernel_name="python3",
            resources={"metadata": {"path": str(folder)}},
        ).execute()
    return notebook


def complaints(notebook: nbformat.NotebookNode) -> list[str]:
    """What a reader would take for a warning: everything on standard error."""
    return [
        f"cell {index}: {output.text.strip()[:300]}"
        for index, cell in enumerate(notebook.cells)
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type == "stream" and output.name == "stderr"
    ]


def tidied(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook as it is stored: no counts, no times of the machine, cells named by place."""
    own = notebook.metadata
    keep = {key: own[key] for key in ("colab", "accelerator") if key in own}
    notebook.metadata = nbformat.from_dict({**_METADATA, **keep})
    for index, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{index:02d}", nbformat.from_dict({})
        if cell.cell_type != "code":
            continue
        cell.execution_count = None
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = None
            output.pop("transient", None)
    return notebook


def main() -> int:
    """Run what the command line names; 1 when a notebook failed or warned."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("numbers", nargs="*", help="beginnings of names, for example 02")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # as without network: no cell waits for one
    make_caches()

    failed = False
    for path in notebooks(options.numbers):
        start = time.perf_counter()
        notebook = execute(path)
        print(f"{path.stem}: {time.perf_counter() - start:.0f} s", flush=True)
        for line in complaints(notebook):
            failed = True
            print(f"  {line}", flush=True)
        if not options.check:
            nbformat.write(tidied(notebook), path)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
