"""A run's folder read again, from Python and from the command line."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import rmipo_lite
from rmipo_lite import demo
from rmipo_lite.cli.main import main
from rmipo_lite.results.model_card import card_of_merged

PROMPTS = ["What is 2 + 2?", "What colour is the sky?"]


def test_it_answers_as_the_run_did(run: Any) -> None:
    loaded = rmipo_lite.load_run(run.output_dir, use_cpu=True)
    assert loaded.conversational is run.conversational is True
    assert loaded.generate(PROMPTS, max_new_tokens=12) == run.generate(PROMPTS, max_new_tokens=12)
    ours, theirs = (one.compare(PROMPTS, max_new_tokens=12) for one in (loaded, run))
    assert (ours.before, ours.after) == (theirs.before, theirs.after)
    checkpoint = next(run.output_dir.glob("checkpoint-*"))
    of_checkpoint = rmipo_lite.load_run(checkpoint, use_cpu=True)
    assert of_checkpoint.generate(PROMPTS, 12) == run.generate(PROMPTS, 12)


def test_loading_shows_no_words_of_other_packages(run: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what the tests' own settings pass over too
        rmipo_lite.load_run(run.output_dir)


def test_it_merges_as_the_run_does(run: Any, tmp_path: Path) -> None:
    merged = rmipo_lite.load_run(run.output_dir, use_cpu=True).merge(tmp_path / "merged")
    own = run.merge(tmp_path / "own")
    weights, others = (load_file(tmp_path / n / "model.safetensors") for n in ("merged", "own"))
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert not isinstance(merged, PeftModel)
    again = rmipo_lite.load_run(tmp_path / "merged", use_cpu=True)
    assert again.generate(PROMPTS, 12) == run.generate(PROMPTS, 12)
    card = (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")
    of_run = (tmp_path / "own" / "README.md").read_text(encoding="utf-8")
    assert "library_name: transformers" in card
    assert "with its adapter merged in" in card
    # the same but for the texts that were compared
    assert card.split("## Held-out metrics")[1] == of_run.split("## Held-out metrics")[1]
    assert own.config.vocab_size == merged.config.vocab_size


def test_a_base_in_16_bits_is_merged_into_16_bits(run: Any, tmp_path: Path) -> None:
    """However the run computed: float32 here, since there is no GPU."""
    base = AutoModelForCausalLM.from_pretrained(demo.MODEL, dtype=torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    run.tokenizer.save_pretrained(tmp_path / "base")
    result = rmipo_lite.train(
        str(tmp_path / "base"), demo.load_rows()[:16], output_dir=tmp_path / "out", max_steps=1,
        learning_rate=1e-3, eval_completions=0, sample_prompts=0, use_cpu=True,
    )  # fmt: skip
    assert next(result.model.parameters()).dtype == torch.float32
    assert result.merge(tmp_path / "merged").dtype == torch.bfloat16
    assert result.merge(dtype=torch.float32).dtype == torch.float32


def test_what_the_folder_does_not_tell_is_said(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = rmipo_lite.load_run(demo.MODEL, use_cpu=True)
    assert loaded.conversational
    assert "doesn't say how it was asked" in capsys.readouterr().out
    assert not rmipo_lite.load_run(demo.MODEL, use_cpu=True, conversational=False).conversational
    with pytest.raises(TypeError, match="before/after needs an adapter, and this model has none"):
        loaded.compare(PROMPTS)
    with pytest.raises(ValueError, match="prompts: none were given, and none held out here"):
        rmipo_lite.load_run(run.output_dir, use_cpu=True).compare()
    with pytest.raises(FileNotFoundError):
        rmipo_lite.load_run(tmp_path / "absent", use_cpu=True)


def test_an_adapter_that_was_merged_in_place_has_no_before(run: Any) -> None:
    loaded = rmipo_lite.load_run(run.output_dir, use_cpu=True)
    loaded.model.merge_and_unload()
    with pytest.raises(TypeError, match=r"was merged into the weights \(merge_and_unload\)"):
        loaded.compare(PROMPTS)


def test_somebody_elses_card_is_kept_below() -> None:
    card = card_of_merged("---\ntags: [x]\n---\n# Mine\n", "KL 0")
    assert card.startswith("# A model with its adapter merged in\n\n## Merged\n\nKL 0\n")
    assert card.endswith("# Mine\n")


def test_the_command_line(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = str(run.output_dir), tmp_path / "answers.jsonl"
    (tmp_path / "more.txt").write_text(f"{PROMPTS[1]}\n\n", encoding="utf-8")
    words = ["generate", folder, PROMPTS[0], "--prompts", str(tmp_path / "more.txt"), "--use_cpu"]
    assert main([*words, "--max_new_tokens", "12", "--output", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["prompt"] for row in rows] == PROMPTS
    assert [row["answer"] for row in rows] == run.generate(PROMPTS, max_new_tokens=12)
    assert f"> {PROMPTS[0]}\n{rows[0]['answer']}" in capsys.readouterr().out
    pairs = tmp_path / "pairs.jsonl"
    lines = [{"prompt": p, "chosen": "a", "rejected": "b"} for p in (*PROMPTS, PROMPTS[0])]
    pairs.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    words = ["compare-answers", folder, "--prompts", str(pairs), "--use_cpu"]
    assert main([*words, "--output", str(out)]) == 0
    assert capsys.readouterr().out.count("before ") == 2
    assert (
        main(["merge", folder, str(tmp_path / "merged"), "--use_cpu", "--dtype", "bfloat16"]) == 0
    )
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16
    capsys.readouterr()
    assert main(["generate", folder]) == 2
    assert "prompts missing: name some" in capsys.readouterr().err
    assert main(["merge", folder, str(tmp_path / "merged")]) == 1
    assert "isn't empty" in capsys.readouterr().err


def test_a_sample_is_drawn_by_its_seed(run: Any, tmp_path: Path) -> None:
    drawn = []
    for place, seed in enumerate((1, 1, 2)):
        out = tmp_path / f"{place}.jsonl"
        words = ["generate", str(run.output_dir), *PROMPTS, "--use_cpu", "--temperature", "3"]
        assert main([*words, "--seed", str(seed), "--output", str(out)]) == 0
        drawn.append(out.read_text(encoding="utf-8"))
    assert drawn[0] == drawn[1] != drawn[2]
