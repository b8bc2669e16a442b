"""New and changed embedding rows travel with the adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import rmipo_lite
from rmipo_lite.adapters.embeddings import embeddings_are_own, look_at_embeddings
from rmipo_lite.adapters.saved import ADAPTER_FILE
from rmipo_lite.model.loading import load_model
from tests.kit import VOCAB, tiny_model, train_words, word_rows

_IDS = torch.arange(3, 27).reshape(2, 12)


def _base(folder: Path, tied: bool = True, rows: int = 0, shard: bool = False) -> Any:
    if not folder.is_dir():
        size = {"max_shard_size": "20KB"} if shard else {}
        tiny_model("llama", tie_word_embeddings=tied).save_pretrained(folder, **size)
    model = AutoModelForCausalLM.from_pretrained(folder)
    if rows:
        model.resize_token_embeddings(VOCAB + rows, mean_resizing=False)
    return model


def _logits(model: Any, ids: torch.Tensor = _IDS) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.eval()(input_ids=ids).logits
    return result


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "tied"),
    [("none", True), ("a row", True), ("a row", False), ("new rows", True), ("new rows", False)],
)
def test_reloading_gives_the_trained_model(change: str, tied: bool, tmp_path: Path) -> None:
    rows = 3 if change == "new rows" else 0
    model = _base(tmp_path / "base", tied, rows, shard=change == "a row")
    if change != "none":
        with torch.no_grad():
            model.get_input_embeddings().weight[-1 if rows else 9] *= 3
    result = train_words(model, tmp_path / "run", max_steps=2, save_steps=1)
    ids = torch.cat([_IDS, torch.full((2, 1), VOCAB + rows - 1)], dim=1)
    want = _logits(result.model, ids)
    again = PeftModel.from_pretrained(_base(tmp_path / "base", tied, rows), result.output_dir)
    assert torch.equal(_logits(again, ids), want)
    assert torch.equal(_logits(load_model(str(result.output_dir), result.args), ids), want)
    with safe_open(result.output_dir / ADAPTER_FILE, "pt") as file:
        saved = any("embed_tokens" in key for key in file.keys())  # noqa: SIM118
    assert saved == (change != "none")
    if change != "new rows":
        return
    more = rmipo_lite.train(
        str(result.output_dir), word_rows(12), tokenizer=result.tokenizer, max_steps=1,
        output_dir=tmp_path / "more", learning_rate=0.0, use_cpu=True,
    )  # fmt: skip
    assert torch.equal(_logits(more.model, ids), want)


@pytest.mark.slow
def test_a_resumed_run_keeps_them(tmp_path: Path) -> None:
    def model() -> Any:
        made = _base(tmp_path / "base", rows=2)
        with torch.no_grad():
            made.get_input_embeddings().weight[-1].fill_(0.3)
        return made

    whole = train_words(model(), tmp_path / "run", max_steps=4, save_steps=2)
    (tmp_path / "run" / "checkpoint-4").rename(tmp_path / "checkpoint-4")
    rest = train_words(model(), tmp_path / "run", max_steps=4, save_steps=2, resume=True)
    assert torch.equal(_logits(rest.model), _logits(whole.model))


@pytest.mark.slow
def test_a_change_between_two_runs_is_seen(tmp_path: Path) -> None:
    model = _base(tmp_path / "base")
    train_words(model, tmp_path / "first")
    model.resize_token_embeddings(VOCAB + 3, mean_resizing=False)
    result = train_words(model, tmp_path / "second", peft_config="new")
    again = load_model(str(result.output_dir), result.args)
    assert torch.equal(_logits(again), _logits(result.model))


@pytest.mark.parametrize("form", ["without the inner model's name", "no safetensors"])
def test_older_files_are_read_or_not_trusted(form: str, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    tiny_model("gpt2").save_pretrained(folder)
    file = folder / "model.safetensors"
    weights = {n.removeprefix("transformer."): w for n, w in load_file(file).items()}
    model = AutoModelForCausalLM.from_pretrained(folder)
    save_file(weights, file, metadata={"format": "pt"})
    if form == "no safetensors":
        file.unlink()
        assert embeddings_are_own(model)
        return
    assert not embeddings_are_own(model)
    with torch.no_grad():
        model.get_input_embeddings().weight[5] += 1
    look_at_embeddings(model)
    assert embeddings_are_own(model)


@pytest.mark.parametrize(
    "options",
    [{"target_modules": ["q_proj", "lm_head"]}, {"trainable_token_indices": [3, VOCAB + 1]}],
)
def test_a_folder_of_a_larger_vocabulary_loads(options: dict[str, Any], tmp_path: Path) -> None:
    model = _base(tmp_path / "base", tied=False, rows=3)
    wanted = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **options}
    result = train_words(model, tmp_path / "run", peft_config=LoraConfig(**wanted))
    again = load_model(str(result.output_dir), result.args)
    assert torch.equal(_logits(again), _logits(result.model))


def test_without_the_bases_files_nobody_can_tell(tmp_path: Path) -> None:
    assert not embeddings_are_own(tiny_model("llama"))
    model = _base(tmp_path / "base")
    model.name_or_path = "owner/not-on-this-machine"
    assert not embeddings_are_own(model)
