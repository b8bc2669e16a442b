"""The command line: help, options from the command line and a file, exit codes, info."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import rmipo_lite
from rmipo_lite import demo
from rmipo_lite.cli.config_options import config_fields, convert
from rmipo_lite.cli.main import main
from rmipo_lite.environment import info
from tests.conftest import ROOT


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Replaces `train` and records what it was given."""
    seen: dict[str, Any] = {"stopped_at_step": None}

    def train(model: str, dataset: str, **options: Any) -> Any:
        seen.update(model=model, dataset=dataset, options=options)
        if "error" in seen:
            raise seen["error"]
        return SimpleNamespace(
            stopped_at_step=seen["stopped_at_step"],
            unsaved=seen.get("unsaved"),
            report=lambda path: seen.update(report=path),
        )

    monkeypatch.setattr(rmipo_lite, "train", train, raising=False)
    return seen


def test_help_is_quick_and_needs_no_torch() -> None:
    code = (
        "import sys\nfrom rmipo_lite.cli.main import main\ncode = main(['--help'])\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\nsys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "train a model on preference pairs" in done.stdout


def test_train_help_is_made_from_the_configs_texts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for name in ("beta", "gamma_max", "prior", "learning_rate"):
        assert f"--{name} " in text
    assert (
        "Scale of the log-probability gap, > 0; None: the method's own (rmipo 2, dpo 0.1)." in text
    )
    assert "--weight_decay" not in text
    assert main(["train", "--help-all"]) == 0
    everything = capsys.readouterr().out
    assert "--weight_decay" in everything
    assert all(f"--{name}" in everything for name in config_fields())


def test_options_reach_train_with_their_types(calls: dict[str, Any]) -> None:
    code = main(
        ["train", "m", "d.jsonl", "--beta", "2.5", "--gradient_checkpointing", "--packing", "false",
         "--max_steps=3", "--max_length", "none", "--save-total-limit", "1", "--eval_dataset", "e",
         "--max_tokens_per_microstep", "512", "--resume", "--quantization", "none",
         "--output_dir", "out", "--report_to", "none"]
    )  # fmt: skip
    assert code == 0
    assert (calls["model"], calls["dataset"]) == ("m", "d.jsonl")
    assert calls["options"] == {
        "beta": 2.5, "gradient_checkpointing": True, "packing": False, "max_steps": 3,
        "max_length": None, "save_total_limit": 1, "eval_dataset": "e", "resume": True,
        "max_tokens_per_microstep": 512, "quantization": "none", "output_dir": "out",
        "report_to": "none",
    }  # fmt: skip


def test_options_file_and_command_line_wins(calls: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: m\ndataset: d\nbeta: 3\nlearning_rate: 2e-5\nmax-steps: 7\n")
    assert main(["train", "--config", str(file), "--beta", "1.5", "--report"]) == 0
    assert calls["options"] == {"beta": 1.5, "learning_rate": 2e-5, "max_steps": 7}
    assert calls["model"] == "m"
    assert calls["report"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "m", "d", "--betta", "1"], "'--betta' (did you mean --beta?)"),
        (["train", "m", "d", "--beta", "two"], "--beta: wanted float, got 'two'"),
        (["train", "m", "d", "--packing", "maybe"], "--packing: wanted bool, got 'maybe'"),
        (["train", "m"], "dataset missing"),
        (["train", "m", "d", "--quantization", "8bit"], "invalid choice: '8bit'"),
        (["train", "m", "d", "--config", "{file}"], "option 'gama_min' (did you mean gamma_min?)"),
        (["trian"], "invalid choice: 'trian'"),
    ],
)  # fmt: skip
def test_wrong_usage_is_2_and_says_how(
    calls: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    words: list[str], message: str,
) -> None:  # fmt: skip
    (tmp_path / "f.yaml").write_text("gama_min: 0.1\n")
    assert main([w.replace("{file}", str(tmp_path / "f.yaml")) for w in words]) == 2
    assert message in capsys.readouterr().err
    assert "model" not in calls


@pytest.mark.parametrize("content", ["- a\n- b\n", "a: [1\n"])
def test_a_broken_options_file_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(content)
    assert main(["train", "m", "d", "--config", str(file)]) == 2
    assert f"--config {file}: " in capsys.readouterr().err


def test_an_error_is_one_sentence_and_1(
    calls: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    calls["error"] = ValueError("RMiPOConfig: beta must be > 0,\n got -1 \x1b[2J hf_secretsecret")
    assert main(["train", "m", "d"]) == 1
    text = capsys.readouterr().err
    assert text.splitlines()[0] == "rmipo-lite: starting"
    assert text.count("\n") == 2
    assert "error: RMiPOConfig: beta must be > 0, got -1 \\x1b[2J <redacted>" in text
    assert "Traceback" not in text
    with pytest.raises(ValueError, match="beta must be"):
        main(["train", "m", "d", "--debug"])


def test_interrupts_are_130(calls: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    calls["stopped_at_step"] = 4
    assert main(["train", "m", "d"]) == 130
    calls["error"] = KeyboardInterrupt()
    assert main(["train", "m", "d"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_result_that_could_not_be_saved_is_1(calls: dict[str, Any]) -> None:
    calls["unsaved"] = "No space left on device"
    assert main(["train", "m", "d"]) == 1


def test_no_command_prints_help_and_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: rmipo-lite" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "hint", "value"),
    [
        ("None", int | None, None), ("1e-5", float, 1e-5), ("3", float, 3.0), ("3", int | str, 3),
        ("auto", str | int, "auto"), ("yes", bool | None, True), ("a,b", list[str], ["a", "b"]),
        ('{"a": 1}', dict | str | None, {"a": 1}), ("false", bool | str, False),
    ],
)  # fmt: skip
def test_convert(text: str, hint: Any, value: Any) -> None:
    assert convert(text, hint) == value
    assert type(convert(text, hint)) is type(value)


def test_every_default_of_the_config_survives_the_command_line() -> None:
    for name, (option, hint) in config_fields().items():
        default = option.default
        if isinstance(default, (bool, int, float)) or default is None:
            if default is None and type(None) not in getattr(hint, "__args__", ()):
                continue  # a default outside its own annotation, in transformers
            assert convert(str(default), hint) == default, name


def test_info_says_what_runs_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert lines["rmipo_lite"] == rmipo_lite.__version__
    assert lines["torch"][0].isdigit()
    found = info()
    assert found.backends["cpu"]
    assert Path(found.cache).is_absolute()
    assert found.precision.split()[0] in ("fp32", "bf16", "fp16")
    assert str(found) == repr(found)


# ---- looking before training ----------------------------------------------------------------


def _pairs_file(folder: Path) -> Path:
    path = folder / "pairs.jsonl"
    rows = demo.load_rows()[:40]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_inspect_prints_and_writes_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, page = _pairs_file(tmp_path), tmp_path / "data.html"
    assert main(["inspect", str(file)]) == 0
    assert "prompt, words" in capsys.readouterr().out
    words = [str(file), "--model", str(demo.MODEL), "--report", str(page), "--top", "1"]
    assert main(["inspect", *words, "--loss_type=simpo", "--output-dir", str(tmp_path / "s")]) == 0
    said = capsys.readouterr().out
    assert "Under tiny-llama" in said
    assert re.search(r"gamma, reward units +0\.500 +0\.500", said)  # simpo's constant one
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert (tmp_path / "s").is_dir()


def test_estimate_prints_the_cards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = _pairs_file(tmp_path)
    words = [str(demo.MODEL), str(file), "--gpu", "T4", "--max_length", "128"]
    assert main(["estimate", *words]) == 0
    said = capsys.readouterr().out
    assert "on T4 16GB (nothing was loaded)" in said
    assert "40 of 40 rows" in said
    assert "RTX 5090 32GB" in said


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["inspect"], 2, "inspect: dataset missing: rmipo-lite inspect DATASET"),
        (["estimate"], 2, "estimate: model missing: rmipo-lite estimate MODEL"),
        (["estimate", str(demo.MODEL), "--gpu", "potato"], 1, "no card is known as 'potato'"),
        (["estimate", str(demo.MODEL), "--gqu", "T4"], 2, "(did you mean --gpu?)"),
        (["inspect", "absent.jsonl"], 1, "absent.jsonl"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == code
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_options_files_know_each_commands_own_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {demo.MODEL}\ngpu: 8GB\nbeta: 3\n", encoding="utf-8")
    assert main(["estimate", "--config", str(file)]) == 0
    assert "on 8 GB card" in capsys.readouterr().out
    file.write_text("resume: true\n", encoding="utf-8")
    assert main(["estimate", str(demo.MODEL), "--config", str(file)]) == 2
    assert "unknown option 'resume'" in capsys.readouterr().err
