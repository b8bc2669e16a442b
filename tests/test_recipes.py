"""docs/recipes.md: every block of code runs as it stands, and leaves what the page says."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from rmipo_lite import demo
from tests.conftest import ROOT

_PAGE = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
_BLOCKS = dict(re.findall(r"^## (.+?)\n.*?```python\n(.*?)```", _PAGE, re.MULTILINE | re.DOTALL))


def _run(title: str) -> dict[str, object]:
    scope: dict[str, object] = {}
    exec(compile(_BLOCKS[title], title, "exec"), scope)
    return scope


@pytest.mark.slow
def test_every_block_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read at its import
    pytest.importorskip("tensorboard")
    pytest.importorskip("trackio")
    shutil.copytree(demo.MODEL, "my-model")
    for name, rows in (("pairs", demo.load_rows()[:80]), ("more", demo.easy_rows()[:30])):
        lines = "\n".join(map(json.dumps, rows))
        Path(f"{name}.jsonl").write_text(lines, encoding="utf-8")

    early = _run("Stop early, keep the best checkpoint")["result"]
    losses = {e["step"]: e["eval_loss"] for e in early.history if "eval_loss" in e and e["step"]}
    assert early.weights_step == min(losses, key=lambda step: losses[step])
    mixed = _run("Several datasets in one")["result"]
    assert (mixed.data_report.total, mixed.data_report.kept) == (100, 100)
    small = _run("LoRA's own settings")["result"]
    assert small.model.active_peft_config.target_modules == {"q_proj", "v_proj"}
    _run("TensorBoard")
    (events,) = Path("watched/runs").iterdir()
    _run("trackio")
    assert [path for path in Path("trackio").rglob("my-project*") if path.stat().st_size]
    capsys.readouterr()
    _run("Use a run again")
    assert "> What is the capital of France?" in capsys.readouterr().out
    assert Path("small-merged/model.safetensors").is_file()

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(events))
    log.Reload()
    assert {"eval/loss", "train/rewards/margins"} <= set(log.Tags()["scalars"])


def test_the_page_has_no_block_that_is_not_run() -> None:
    assert _PAGE.count("```python") == len(_BLOCKS) == 6
