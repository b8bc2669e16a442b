"""`train()` from start to end on a real small model, and what it leaves behind."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import rmipo_lite
from rmipo_lite.one_liner import runaway_warning
from tests.conftest import REFERENCES

MODEL = REFERENCES / "model_sft"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(REFERENCES / "tokenizer")


def _rows(count: int = 24) -> list[dict[str, str]]:
    return [
        {
            "prompt": f"User: What is {i} and {i}?\nAssistant:",
            "chosen": f" It is {2 * i}, I think.",
            "rejected": " The sea is blue." if i % 2 else " I am not sure about that.",
        }
        for i in range(count)
    ]


def _train(model: Any, tokenizer: Any, folder: Path, **options: Any) -> rmipo_lite.TrainResult:
    settings = {"max_steps": 3, "learning_rate": 5e-3, "per_device_train_batch_size": 8, **options}
    dataset = settings.pop("dataset", None) or _rows()
    return rmipo_lite.train(model, dataset, tokenizer=tokenizer, output_dir=folder, **settings)


def test_from_a_folder_to_a_saved_adapter(
    tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = _train(str(MODEL), tokenizer, tmp_path / "run")
    out = capsys.readouterr().out
    assert "24 in = 24 kept + 0 dropped + 0 refused" in out
    assert out.index("rows  ") < out.index("step ")  # the report comes before the training
    assert result.metrics["eval_loss"] < result.metrics_before["eval_loss"]
    assert result.stopped_at_step is None
    assert [log["step"] for log in result.history if "loss" in log] == [3]
    assert [log["step"] for log in result.history if "eval_loss" in log] == [0, 3]
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "run" / "README.md").is_file()
    # The saved adapter on a fresh base is the trained model.
    fresh = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL), tmp_path / "run")
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        assert torch.equal(fresh(ids).logits, result.model.eval()(ids).logits)


def test_twice_on_one_model_goes_on_with_one_adapter(tokenizer: Any, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    first = _train(model, tokenizer, tmp_path / "a")
    trainable = {
        n: p.detach().clone() for n, p in first.model.named_parameters() if p.requires_grad
    }
    second = _train(model, tokenizer, tmp_path / "b")
    assert second.model is first.model
    assert {n for n, p in second.model.named_parameters() if p.requires_grad} == set(trainable)
    assert second.metrics_before["eval_loss"] == pytest.approx(first.metrics["eval_loss"], abs=1e-6)
    fresh = _train(model, tokenizer, tmp_path / "c", peft_config="new")
    assert fresh.metrics_before["eval_loss"] == pytest.approx(
        first.metrics_before["eval_loss"], abs=1e-6
    )


@pytest.mark.parametrize("checkpointing", [None, True])
def test_what_the_run_changed_is_put_back(
    checkpointing: bool | None, tokenizer: Any, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL).eval()
    model.config.use_cache = True
    attention = model.config._attn_implementation
    side = tokenizer.padding_side
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    _train(model, tokenizer, tmp_path / "run", gradient_checkpointing=checkpointing)
    assert not any(layer.gradient_checkpointing for layer in model.model.layers)
    assert not model.get_input_embeddings()._forward_hooks
    assert not any("forward" in vars(module) for module in model.modules())
    assert not model.training
    assert model.config.use_cache is True
    assert model.config._attn_implementation == attention
    assert tokenizer.padding_side == side
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])


def test_another_run_is_never_written_over(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="another run is never written over"):
        _train(str(MODEL), tokenizer, tmp_path / "run")


def test_default_folders_are_named_after_the_model(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = [
        rmipo_lite.train(str(MODEL), _rows(), tokenizer=tokenizer, max_steps=1).output_dir.name
        for _ in range(2)
    ]
    assert names == ["rmipo-model_sft", "rmipo-model_sft-2"]


def test_resume_gives_the_uninterrupted_weights(tokenizer: Any, tmp_path: Path) -> None:
    """Cut after step 2 of 4: a later call finds the folder with its checkpoints and no more."""
    options = {"max_steps": 4, "save_steps": 1, "save_total_limit": 9}
    whole = _train(str(MODEL), tokenizer, tmp_path / "whole", **options)
    (tmp_path / "cut").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "cut" / "checkpoint-2")
    resumed = _train(str(MODEL), tokenizer, tmp_path / "cut", **options, resume=True)
    ours = dict(resumed.model.named_parameters())
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, ours[name]), name


def test_an_evaluation_set_of_ones_own(tokenizer: Any, tmp_path: Path) -> None:
    result = _train(
        str(MODEL),
        tokenizer,
        tmp_path / "run",
        eval_dataset=_rows(5),
        max_steps=1,
        loss_type="simper",
    )
    assert "eval_rewards/accuracies" in result.metrics
    assert "eval_rmipo/gamma" not in result.metrics


def test_too_few_pairs_to_hold_any_out(
    tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = _train(str(MODEL), tokenizer, tmp_path / "run", dataset=_rows(3), max_steps=1)
    assert result.metrics_before == {}
    assert "Too few pairs or prompts to hold any out" in capsys.readouterr().out


def test_conversations_need_a_template_and_plain_gives_one(tokenizer: Any, tmp_path: Path) -> None:
    rows = [
        {
            "prompt": [{"role": "user", "content": f"What is {i}?"}],
            "chosen": [{"role": "assistant", "content": f"A number, {i}."}],
            "rejected": [{"role": "assistant", "content": "No."}],
        }
        for i in range(10)
    ]
    with pytest.raises(ValueError, match='chat_template="plain"'):
        _train(str(MODEL), tokenizer, tmp_path / "a", dataset=rows)
    result = _train(
        str(MODEL), tokenizer, tmp_path / "b", dataset=rows, chat_template="plain", max_steps=1
    )
    assert "Assistant: " in result.tokenizer.chat_template
    assert tokenizer.chat_template is None
    saved = AutoTokenizer.from_pretrained(tmp_path / "b")
    assert saved.chat_template == result.tokenizer.chat_template


def test_quantising_a_loaded_model_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    with pytest.raises(ValueError, match="for a model given by name or folder"):
        _train(model, tokenizer, tmp_path / "run", quantization="4bit")


def test_four_bit_trains(tokenizer: Any, tmp_path: Path) -> None:
    result = _train(str(MODEL), tokenizer, tmp_path / "run", quantization="4bit")
    assert result.metrics["eval_loss"] < result.metrics_before["eval_loss"]
    moved = [p for n, p in result.model.named_parameters() if "lora_B" in n]
    assert all(p.abs().max() > 0 for p in moved)


@pytest.mark.parametrize(
    ("before", "after", "warns"),
    [(-4.4, -7.9, True), (-4.4, -4.9, False), (-4.4, -3.0, False)],
)
def test_a_margin_won_by_forgetting_is_said(before: float, after: float, warns: bool) -> None:
    name = "eval_logps/chosen"
    warning = runaway_warning({name: before}, {name: after})
    assert (warning is not None) == warns
    if warning is not None:
        assert "less likely, by 3.5 nats per token" in warning
    assert runaway_warning({}, {}) is None
