"""What can't be saved is known before anything is trained; what was trained is never lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, TrainerCallback

import rmipo_lite
from rmipo_lite.checkpoints import trainer_mixin, weights
from rmipo_lite.results import result as result_module
from tests.kit import tiny_model, train_words


class _Counting(TrainerCallback):
    steps = 0

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        type(self).steps += 1


@pytest.fixture(autouse=True)
def _count() -> None:
    _Counting.steps = 0


def _break(model: Any, what: str) -> dict[str, Any]:
    """Make something of a run one that can't be saved; the options of the run."""
    if what == "generation_config":
        model.generation_config.num_return_sequences = 3
    if what == "config":
        model.config.strange = object()
    return {"peft_config": None} if what == "config" else {}


@pytest.mark.parametrize("what", ["generation_config", "config"])
def test_what_cannot_be_saved_is_refused_before_the_first_step(what: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    options = _break(model, what)
    with pytest.raises(ValueError, match=r"generation_config|could not be saved"):
        train_words(model, tmp_path / "run", callbacks=[_Counting()], **options)
    assert _Counting.steps == 0


@pytest.mark.parametrize("error", [ValueError("no"), TypeError("no"), RuntimeError("no")])
@pytest.mark.parametrize("peft_config", ["auto", None])
def test_no_error_of_a_save_loses_the_result(
    error: Exception, peft_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(result_module, "save_run", failing)
    result = train_words(tiny_model("llama"), tmp_path / "run", peft_config=peft_config)
    assert result.unsaved == "no"
    assert "NOT SAVED" in repr(result)
    monkeypatch.undo()
    result.save(tmp_path / "later")
    assert (tmp_path / "later" / "generation_config.json").is_file()


def test_a_checkpoint_that_fails_is_told_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:

    def failing(*args: Any, **kwargs: Any) -> None:
        raise TypeError("a state without a form")

    monkeypatch.setattr(trainer_mixin, "save_state", failing)
    result = train_words(tiny_model("llama"), tmp_path / "run", max_steps=3, save_steps=1)
    assert capsys.readouterr().out.count("a state without a form") == 3
    assert result.unsaved is None
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_full_model_is_rehearsed_without_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    monkeypatch.setattr(weights, "save_weights", lambda *args: written.append(args[1]))
    model, tokenizer = tiny_model("llama"), None
    weights.rehearse_save(model, tokenizer, rmipo_lite.RMiPOConfig(str(tmp_path), use_cpu=True))
    assert written == []


def test_a_failed_merge_leaves_result_and_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = train_words(tiny_model("llama"), tmp_path / "run")

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(result_module, "save_run", full)
    with pytest.raises(OSError, match="No space left"):
        result.merge(tmp_path / "merged")
    monkeypatch.undo()
    assert list((tmp_path / "merged").iterdir()) == []
    assert len(result.compare(["w3 w4"])) == 1
    result.merge(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert plain.config.use_cache is True
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "library_name: transformers" in card
    assert "with its adapter merged in" in card
    assert "KL from the trained model" in card
    with pytest.raises(FileExistsError, match="isn't empty"):
        result.merge(tmp_path / "merged")


@pytest.mark.parametrize("peft_config", ["auto", None])
def test_nothing_of_the_training_leaks_into_a_saved_config(
    peft_config: Any, tmp_path: Path
) -> None:
    tiny_model("llama", attention_dropout=0.1).save_pretrained(tmp_path / "base")
    result = train_words(str(tmp_path / "base"), tmp_path / "run", peft_config=peft_config)
    saved = result.output_dir
    if peft_config is not None:
        saved = tmp_path / "merged"
        result.merge(saved)
    before, after = (
        json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "base", saved)
    )
    assert after == before


def test_a_merge_that_gives_nan_is_refused_and_not_written(tmp_path: Path) -> None:
    result = train_words(tiny_model("llama", tie_word_embeddings=False), tmp_path / "run")
    with torch.no_grad():
        result.model.get_output_embeddings().weight.mul_(1e8)  # past the end of float16
    with pytest.raises(ValueError, match=r"dtype: in torch\.float16 the merged model gives NaN"):
        result.merge(tmp_path / "merged", dtype=torch.float16)
    assert not (tmp_path / "merged").exists()
    result.merge(tmp_path / "merged", dtype=torch.bfloat16)


def test_a_merged_model_knows_its_folder(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "base")
    first = train_words(str(tmp_path / "base"), tmp_path / "run", learning_rate=1e-2)
    with pytest.raises(TypeError, match=r"dtype: wanted a floating torch\.dtype or None, got 'bf"):
        first.merge(dtype="bfloat16")  # type: ignore[arg-type]
    merged = first.merge(tmp_path / "merged")
    second = train_words(merged, tmp_path / "second", learning_rate=1e-2)
    again = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), second.output_dir
    )
    ids = torch.arange(3, 20)[None]
    assert torch.equal(again.eval()(ids).logits, second.model.eval()(ids).logits)
    config = json.loads((second.output_dir / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "merged")


def test_the_card_of_a_model_trained_in_full_calls_it_that(tmp_path: Path) -> None:
    result = train_words(tiny_model("llama"), tmp_path / "run", peft_config=None)
    card = (result.output_dir / "README.md").read_text()
    assert "library_name: transformers" in card
    assert "trained in full" in card
    assert "lora" not in card.split("---")[1]
