"""Data flows one way: a module imports only from rooms before its own (the order of the design)."""

from __future__ import annotations

import ast

from tests.conftest import ROOT

PACKAGE = ROOT / "rmipo_lite"

# From the first room to the last. Names in one line may not import each other.
ORDER = [
    {"data_files", "model_files", "template_limits"},
    {"config", "display", "redaction", "data_report", "data_sources", "data_rows", "text_encoder",
     "authors_tokenization", "cli_options", "plots", "ops", "device_memory"},
    {"run_progress", "findings", "cards"},
    {"panel", "text_progress"},
    {"data", "state_io", "progress", "interrupt", "environment"},
    {"chat_templates", "checkpoint_files", "near_duplicates"},
    {"row_tokens", "text_checks", "score_file"},
    {"tokenization", "token_checks", "suspicious"},
    {"batch", "adapter_files", "generation"},
    {"varlen_attention", "checkpoint", "fused_lora", "completions"},
    {"attention"},
    {"model"},
    {"footprint"},
    {"loss", "loading", "budget"},
    {"surroundings"},
    {"metrics", "selfcheck", "trainer_setup"},
    {"step"},
    {"run_log", "pair_scores", "symptoms"},
    {"doctor"},
    {"trainer"},
    {"preflight"},
    {"model_card"},
    {"report"},
    {"inspection_view", "estimation_view", "workload"},
    {"result", "inspection", "estimation"},
    {"one_liner"},
    {"demo"},
    {"bench"},
    {"selftest"},
    {"cli_parser"},
    {"cli"},
]  # fmt: skip
# Imported inside a function, at use: result -> report and model_card are drawn from a result.
ROOM = {name: level for level, names in enumerate(ORDER) for name in names}


def _imports(path: str) -> set[str]:
    tree = ast.parse((PACKAGE / path).read_text())
    found = set()
    for node in tree.body:  # only what runs at import time
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rmipo_lite"):
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return found - {"__version__"}


def _modules() -> list[str]:
    return sorted(
        str(p.relative_to(PACKAGE)) for p in PACKAGE.rglob("*.py") if p.name != "__init__.py"
    )


def test_every_module_has_its_room() -> None:
    rooms = {name.split("/")[0].removesuffix(".py") for name in _modules()}
    assert rooms == set(ROOM)


def test_imports_go_one_way() -> None:
    wrong = []
    for name in _modules():
        room = name.split("/")[0].removesuffix(".py")
        wrong += [
            f"{name} imports {other}"
            for other in _imports(name)
            if other != room and ROOM[other] >= ROOM[room]
        ]
    assert wrong == []


def test_no_module_hides_a_public_function() -> None:
    """With lazy imports `rmipo_lite.train` would be the module and not the function."""
    import rmipo_lite

    modules = {name.split("/")[0].removesuffix(".py") for name in _modules()}
    assert modules & set(rmipo_lite.__all__) == set()


def test_the_public_surface_is_importable() -> None:
    import rmipo_lite

    for name in rmipo_lite.__all__:
        assert getattr(rmipo_lite, name) is not None
