"""Going on from a checkpoint: another run is refused by name, other options take effect."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

import rmipo_lite
from rmipo_lite.checkpoints.sealed_folder import CheckpointError
from tests.kit import tiny_model, train_words, trained_weights, word_rows

_ROWS = word_rows(40)
_OPTIONS: dict[str, Any] = {
    "num_train_epochs": 1, "save_steps": 2, "logging_steps": 1, "eval_completions": 0,
    "sample_prompts": 0, "save_total_limit": None, "eval_dataset": word_rows(4, seed=5),
    "lr_scheduler_type": "linear", "warmup_steps": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of ten steps, of which the checkpoint of step 4 is left."""
    folder = tmp_path_factory.mktemp("resume") / "run"
    train_words(tiny_model("llama"), folder, _ROWS, **_OPTIONS)
    for checkpoint in folder.glob("checkpoint-*"):
        if checkpoint.name != "checkpoint-4":
            shutil.rmtree(checkpoint)
    return folder


def _resumed(
    run: Path, folder: Path, rows: Any = None, model: Any = None, **options: Any
) -> rmipo_lite.TrainResult:
    shutil.copytree(run, folder)
    wanted = {**_OPTIONS, **options}
    return train_words(model or tiny_model("llama"), folder, rows or _ROWS, resume=True, **wanted)


def _rates(result: rmipo_lite.TrainResult) -> list[float]:
    return [entry["learning_rate"] for entry in result.history if "learning_rate" in entry]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"rows": word_rows(40, seed=3)}, "pairs_digest is"),
        ({"rows": _ROWS[:24]}, "pairs is 40 there and 24 here"),
        ({"seed": 7}, "seed is 42 there and 7 here"),
        ({"max_length": 20}, "max_length is 1024 there and 20 here"),
        ({"model": "wider"}, "model vocabulary is"),
        ({"model": "other"}, "the base model's base_model.model.model.embed_tokens.weight is ["),
        ({"model": "same ends"}, "self_attn.q_proj.base_layer.weight is ["),
        ({"train_sampling_strategy": "sequential"}, "is 'random' there and 'sequential' here"),
        ({"prior": "cached"}, "prior was 'live' there and is 'cached' here"),
        (
            {"peft_config": LoraConfig(r=8, lora_alpha=32, target_modules="all-linear")},
            "peft_config r is 16 there and 8 here",
        ),
        (
            {"peft_config": LoraConfig(r=16, lora_alpha=64, target_modules="all-linear")},
            "peft_config lora_alpha is 32 there and 64 here",
        ),
        ({"peft_config": None}, "peft_config is"),
    ],
)
def test_another_run_is_refused_by_name(
    changed: dict[str, Any], words: str, run: Path, tmp_path: Path
) -> None:
    changed = dict(changed)
    if changed.get("model") == "wider":
        changed["model"] = tiny_model("llama", vocab_size=96)
    elif changed.get("model") == "other":
        changed["model"] = tiny_model("llama", seed=5)
    elif changed.get("model") == "same ends":  # as of a merged model and its base
        changed["model"] = tiny_model("llama")
        with torch.no_grad():
            for layer in changed["model"].model.layers:
                layer.self_attn.q_proj.weight.mul_(1.1)
    with pytest.raises(CheckpointError) as error:
        _resumed(run, tmp_path / "run", **changed)
    assert words in str(error.value)
    assert "there and" in str(error.value)


@pytest.mark.parametrize("prior", ["live", "cached"])
def test_a_method_without_a_prior_left_none(prior: str, tmp_path: Path) -> None:
    """Scored now it would be that of a model half trained."""
    options = {**_OPTIONS, "prior": prior}
    train_words(tiny_model("llama"), tmp_path / "dpo", _ROWS, loss_type="dpo", **options)
    words = "loss_type was 'dpo', which has no prior, there and prior is 'cached' here"
    with pytest.raises(CheckpointError, match=words):
        _resumed(tmp_path / "dpo", tmp_path / "cached", prior="cached", beta=2.0)
    _resumed(tmp_path / "dpo", tmp_path / "live", prior="live", beta=2.0, max_steps=12)


def test_a_cached_prior_outlives_a_method_without_one(tmp_path: Path) -> None:
    """It is that of the untrained model still, unless it was scored again on the way."""
    for prior in ("cached", "refresh:3"):
        begun, between = tmp_path / prior[:6], tmp_path / f"{prior[:6]}, simpo"
        train_words(tiny_model("llama"), begun, _ROWS, prior=prior, **_OPTIONS)
        _resumed(begun, between, prior="cached", loss_type="simpo", max_steps=12)
        if prior == "cached":
            _resumed(between, tmp_path / "end", prior="cached", max_steps=14)
            continue
        with pytest.raises(CheckpointError, match="cached prior is that of the model before"):
            _resumed(between, tmp_path / "other end", prior="cached", max_steps=14)


def test_the_same_options_go_on_without_a_word(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train_words(tiny_model("llama"), tmp_path / "whole", _ROWS, **_OPTIONS)
    capsys.readouterr()
    result = _resumed(run, tmp_path / "run")
    assert "other options" not in capsys.readouterr().out
    own, wanted = (trained_weights(r.model) for r in (result, whole))
    assert all(torch.equal(own[name], wanted[name]) for name in wanted)


def test_another_learning_rate_takes_effect(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = _resumed(run, tmp_path / "run", learning_rate=1e-4)
    assert "Going on with other options than before: learning_rate 0.01 -> 0.0001" in (
        capsys.readouterr().out
    )
    # linear, without warm-up, of ten steps: the fifth step's is 1 - 4/10
    assert _rates(result)[4:] == pytest.approx([1e-4 * (1 - s / 10) for s in range(4, 10)])


@pytest.mark.parametrize(("batch", "last"), [(8, 7), (3, 13)])
def test_another_batch_goes_on_at_the_same_pair(
    batch: int, last: int, run: Path, tmp_path: Path
) -> None:
    result = _resumed(
        run, tmp_path / "run", per_device_train_batch_size=batch, save_pair_values=True,
        logging_steps=1,
    )  # fmt: skip
    assert result.history[-1]["step"] == last  # 16 of 40 pairs are behind it
    assert result.history[-1]["epoch"] == pytest.approx(1.0)


def _prune(folder: Path, last: int) -> None:
    for checkpoint in folder.glob("checkpoint-*"):
        if int(checkpoint.name.rpartition("-")[2]) > last:
            shutil.rmtree(checkpoint)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "batches", "stops"),
    [
        ({"num_train_epochs": 1}, (4, 8, 8), (4, 5)),
        ({"num_train_epochs": 2}, (8, 4, 8), (6, 8)),  # in the second epoch
    ],
)
def test_every_pair_is_trained_once_an_epoch_however_often_the_batch_changes(
    options: dict[str, Any], batches: tuple[int, ...], stops: tuple[int, ...], tmp_path: Path
) -> None:
    folder, kept = tmp_path / "run", []
    wanted = {**_OPTIONS, **options, "save_steps": 1, "save_pair_values": True}
    for part, batch in enumerate(batches):
        train_words(
            tiny_model("llama"), folder, _ROWS, resume=part > 0,
            per_device_train_batch_size=batch, **wanted,
        )  # fmt: skip
        lines = (folder / "pair_values.jsonl").read_text().splitlines()
        kept = [json.loads(line) for line in lines]
        if part < len(stops):
            _prune(folder, stops[part])
    counts = Counter(line["row"] for line in kept)
    assert set(counts.values()) == {options["num_train_epochs"]}
    assert len(counts) == len(_ROWS)


def test_a_model_trained_in_full_goes_on(tmp_path: Path) -> None:
    """Every weight has moved since the run began: none of them says that it is another model."""
    wanted = {**_OPTIONS, "peft_config": None, "learning_rate": 0.05}
    whole = train_words(tiny_model("llama"), tmp_path / "run", _ROWS, **wanted)
    _prune(tmp_path / "run", 6)
    rest = train_words(tiny_model("llama"), tmp_path / "run", _ROWS, resume=True, **wanted)
    want = whole.model.state_dict()
    assert all(torch.equal(w, want[name]) for name, w in rest.model.state_dict().items())


def test_more_epochs_and_another_schedule(run: Path, tmp_path: Path) -> None:
    result = _resumed(run, tmp_path / "run", num_train_epochs=2, lr_scheduler_type="constant")
    assert result.history[-1]["step"] == 20
    assert set(_rates(result)[4:]) == {0.01}


def test_another_optimizer_begins_anew(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = _resumed(run, tmp_path / "run", optim="sgd")
    said = capsys.readouterr().out
    assert "optim 'adamw_torch_fused' -> 'sgd'" in said
    assert "begins anew with sgd" in said
    assert result.history[-1]["step"] == 10


def test_another_loss_and_logging_take_effect(run: Path, tmp_path: Path) -> None:
    result = _resumed(run, tmp_path / "run", loss_type="simpo", logging_steps=3)
    logged = [entry for entry in result.history if "loss" in entry]
    assert [entry["step"] for entry in logged][-3:] == [6, 9, 10]
    assert "rmipo/gamma" not in logged[-1]


@pytest.mark.parametrize("steps", [2, 4])
def test_with_nothing_to_do_the_result_comes_back(
    steps: int, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = _resumed(run, tmp_path / "run", max_steps=steps)
    assert f"Nothing to do: step 4 of {steps} is reached already" in capsys.readouterr().out
    assert result.history[-1]["step"] == 4
    assert result.metrics["eval_loss"] != result.metrics_before["eval_loss"]
