"""The scripts beside the notebooks, as modules: the folder is no package."""

from __future__ import annotations

import importlib.util
from types import ModuleType

from tests.conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))


def script(name: str) -> ModuleType:
    """`notebooks/<name>.py`, run as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "notebooks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
