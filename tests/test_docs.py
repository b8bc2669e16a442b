"""The page for people who come from trl: every name in it exists, every block of code compiles."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import pkgutil
import re
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml

import rmipo_lite
from rmipo_lite import RMiPOConfig, RMiPOTrainer, TrainResult
from rmipo_lite.ops.losses import LOSSES
from tests.conftest import ROOT
from tests.kit import word_tokenizer
from tests.training.test_trainer import _trainer as pair_trainer

PAGE = (ROOT / "docs" / "from_trl.md").read_text(encoding="utf-8")
OURS = (
    {field.name for field in dataclasses.fields(RMiPOConfig)}
    | set(inspect.signature(RMiPOTrainer.__init__).parameters)
    | set(inspect.signature(rmipo_lite.train).parameters)
)


def table(heading: str) -> list[list[str]]:
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[1:]]


def names(cell: str) -> list[str]:
    """What stands in backticks, without values: `prior="cached"` is prior."""
    return [text.split("=")[0] for text in re.findall(r"`([^`]+)`", cell)]


def test_every_option_of_ours_exists() -> None:
    rows = table("Options")
    assert len(rows) == 44
    for row in rows:
        for name in names(row[1]):
            if name.startswith("TrainResult."):
                assert hasattr(TrainResult, name.split(".")[1]), name
            else:
                assert name in OURS, name


def test_every_option_of_trl_exists() -> None:
    cpo = pytest.importorskip("trl.experimental.cpo", reason="trl isn't installed")
    dpo = pytest.importorskip("trl")
    theirs = {"resume_from_checkpoint"}  # of their trainers' train()
    for config in (cpo.CPOConfig, dpo.DPOConfig, dpo.KTOConfig):
        theirs |= {field.name for field in dataclasses.fields(config)}
    for trainer in (cpo.CPOTrainer, dpo.DPOTrainer, dpo.KTOTrainer):
        theirs |= set(inspect.signature(trainer.__init__).parameters)
    missing = [name for row in table("Options") for name in names(row[0]) if name not in theirs]
    assert not missing


def test_every_metric_is_one_that_is_logged(tmp_path: Path) -> None:
    trainer = pair_trainer(tmp_path, word_tokenizer(), max_steps=1)
    trainer.train()
    trainer.evaluate(trainer.train_dataset)
    logged = {name for entry in trainer.state.log_history for name in entry}
    wanted = {name for row in table("Metrics") for name in names(row[1])}
    # Logged when there are any, where responses have an end, and of unpaired rows.
    assert wanted - logged == {"rmipo/dropped_pairs", "rmipo/end_nll", "kl"}


def test_the_loss_types_of_the_page_are_ours() -> None:
    assert set(re.findall(r'loss_type="(\w+)"', PAGE)) <= set(LOSSES)


def test_every_block_of_code_compiles_with_options_that_exist() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert len(blocks) == 2
    for block in blocks:
        for call in ast.walk(ast.parse(block)):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "RMiPOConfig":
                assert {keyword.arg for keyword in call.keywords} <= OURS


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pictures_and_pages_that_a_page_shows_are_there(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    assert [x for x in links if "://" not in x and not (page.parent / x).exists()] == []


def test_the_readme_is_short_and_leads_to_every_page() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.count("\n") <= 180
    missing = [page.name for page in PAGES[1:] if f"docs/{page.name}" not in readme]
    assert missing == []


def test_files_and_names_that_the_architecture_tells_of_are_there() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for name in re.findall(r"`((?:\w+/)+\w+\.\w+)`", text):
        assert (ROOT / name).exists() or (ROOT / "rmipo_lite" / name).exists(), name
    for name in re.findall(r"`(\w+(?:\.\w+)+)`", text):
        if not name.endswith(".py"):
            assert pkgutil.resolve_name(f"rmipo_lite.{name}"), name


def test_numbers_of_the_readme_stand_in_the_table() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    said = readme.split("## How fast, how small, how safe")[1].split("**Nothing")[0]
    table = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| ")]
    medians = {cell.split()[0] for row in rows for cell in row[2:4] if cell.strip()}
    numbers = re.findall(r"\b0\.\d+", said)
    assert len(numbers) == 6
    assert set(numbers) <= medians


@pytest.mark.slow
def test_the_tour_of_the_readme_runs_and_has_ten_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tour = re.search(r"A tour in ten lines.*?```python\n(.*?)```", readme, re.S)
    assert tour is not None
    lines = [line for line in tour.group(1).splitlines() if line]
    assert len(lines) == 10
    monkeypatch.chdir(tmp_path)
    exec(tour.group(1).replace("max_steps=90", "max_steps=2"), {})
    for name in ("run.html", "my-adapter/adapter_model.safetensors", "merged/model.safetensors"):
        assert (tmp_path / name).is_file(), name


def _messages() -> list[str]:
    """Every text of the package, with … where a value stands in it."""

    def text(node: ast.AST) -> str:
        if isinstance(node, ast.Constant):
            return str(node.value)
        return "".join(map(text, node.values)) if isinstance(node, ast.JoinedStr) else "…"

    return [
        text(node)
        for path in (ROOT / "rmipo_lite").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.JoinedStr | ast.Constant)
    ]


def test_the_headings_of_the_troubleshooting_page_are_messages() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    headings = re.findall(r"^### .*`([^`]+)`$", page, re.MULTILINE)
    assert len(headings) > 35
    messages = _messages()
    gone = [heading for heading in headings if not any(heading in text for text in messages)]
    assert gone == []


@pytest.mark.parametrize("as_messages", [False, True])
def test_the_task_for_lm_evaluation_harness_reads_rows_of_both_kinds(as_messages: bool) -> None:
    """Its templates as that program renders them: a text, and a list in Python's notation."""
    page = (ROOT / "docs" / "judging.md").read_text(encoding="utf-8")
    task = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", page, re.S)[0])
    texts = {"prompt": "What is it?", "chosen": 'It\'s "this".\n', "rejected": "That."}
    row: dict[str, Any] = dict(texts)
    if as_messages:
        row = {
            name: [{"role": "user" if name == "prompt" else "assistant", "content": text}]
            for name, text in texts.items()
        }
    shown = [jinja2.Template(task[name]).render(**row) for name in ("doc_to_text", "doc_to_choice")]
    assert shown[0] == texts["prompt"]
    assert ast.literal_eval(shown[1]) == [texts["chosen"], texts["rejected"]]
    assert task["doc_to_target"] == 0
