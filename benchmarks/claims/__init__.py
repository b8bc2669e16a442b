"""The study behind docs/claims.md: what the untuned default loses against the best tuned run.

    python -m benchmarks claims                      # the demo's world
    python -m benchmarks claims --model GEMMA        # and a real model's, from its folder
    python -m benchmarks claims --world stories --model STORIES260K

One row a run in claims.csv; runs that stand there are not made again, so an interrupted study goes
on where it was. What was fixed before the first row is in frozen.md.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType


def run(
    folder: Path, model: Path | None = None, *, world_of: str = "gemma", quick: bool = False
) -> None:
    """Make what is missing of the rows: the demo's world, or of `model`, a base model's folder.

    The base model's supervised start is written beside its folder, as <folder>-start.
    """
    from benchmarks.claims import cells, small
    from benchmarks.claims.runs import run_all
    from rmipo_lite.output.console import say

    world: ModuleType = small
    grid = list(cells.small(tuple(small.TASKS)))
    if quick:
        grid = [cells.Cell("demo", "clean", "rmipo", "0.001", 0, steps=2)]
        folder = folder / "quick"
    elif model is not None:
        start = model.resolve().with_name(f"{model.resolve().name}-start")
        os.environ["CLAIMS_MODEL"] = str(start)  # worker processes read it too
        from benchmarks.claims import real, stories

        world, of = {"gemma": (real, cells.real), "stories": (stories, cells.stories)}[world_of]
        world.make_start(model, start)
        grid = list(of(tuple(world.TASKS)))
    for line in run_all(folder / "claims" / "claims.csv", grid, world):
        say(line)


def write_page(folder: Path) -> None:
    """The tables and the picture of docs/claims.md, beside `folder`, where there are rows."""
    from benchmarks.claims import page

    path = folder / "claims" / "claims.csv"
    if path.exists():
        page.write(path, folder.parent / "docs" / "claims.md")
