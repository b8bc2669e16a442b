"""What only a real model shows: Gemma 3 270M, its own numbers, a run on public pairs, float16.

`RMIPO_LITE_GEMMA` names a folder with the model; else it is made from packages, which takes a
minute, and every test skips where that fails.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import rmipo_lite
from rmipo_lite.config import RMiPOConfig
from rmipo_lite.planning.half_range import keep_model_in_range, leaves_half
from rmipo_lite.tokens.pair import TokenizedPair

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def gemma(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    if os.environ.get("RMIPO_LITE_GEMMA"):
        return os.environ["RMIPO_LITE_GEMMA"]
    above = tmp_path_factory.getbasetemp().parent  # one for every process of the tests
    with FileLock(above / "gemma.lock"):
        made = subprocess.run(
            [sys.executable, str(shared / "models" / "gemma3_270m.py"), str(above / "gemma")],
            capture_output=True, text=True, check=False, timeout=600,
        )  # fmt: skip
    if made.returncode:
        pytest.skip(f"Gemma 3 270M can't be made here: {made.stderr.strip()[-200:]}")
    return str(above / "gemma")


@pytest.fixture(scope="module")
def rows(shared: Path) -> list[dict[str, str]]:
    """The public pairs of few words, so that a run of some steps takes seconds."""
    with gzip.open(shared / "data" / "pairs_public_text.jsonl.gz", "rt", encoding="utf-8") as lines:
        every = [json.loads(line) for line in lines]
    return [row for row in every if 200 < sum(len(row[side]) for side in _SIDES) < 500]


_SIDES = ("prompt", "chosen", "rejected")


def _mean_logp(model: Any, before: list[int], response: list[int]) -> float:
    """Nats per token by plain transformers; a first token that nothing stands before is left."""
    ids = torch.tensor([before + response])
    with torch.no_grad():
        logps = model(ids).logits[0, :-1].double().log_softmax(-1)
    told = logps.gather(1, ids[0, 1:, None])[:, 0]
    return float(told[max(0, len(before) - 1) :].mean())


def test_scores_are_plain_transformers(gemma: str, rows: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(gemma, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(gemma)
    few, contexts = rows[:2], {"auto": [tokenizer.bos_token_id], "none": []}
    found = {
        name: rmipo_lite.inspect(few, model, tokenizer=tokenizer, prior_context=name).columns
        for name in contexts
    }
    for place, row in enumerate(few):
        prompt = tokenizer(row["prompt"]).input_ids
        assert prompt[0] == tokenizer.bos_token_id
        for side in ("chosen", "rejected"):
            response = tokenizer(row[side], add_special_tokens=False).input_ids
            response.append(tokenizer.eos_token_id)
            given = _mean_logp(model, prompt, response)
            for name, front in contexts.items():
                ours = [found[name][f"{side}_{column}"][place] for column in ("logps", "pmi")]
                wanted = (given, given - _mean_logp(model, front, response))
                assert ours == pytest.approx(wanted, abs=1e-4)


def test_a_run_alarms_about_nothing_and_its_folder_answers_as_it_did(
    gemma: str, rows: Any, tmp_path: Path
) -> None:
    result = rmipo_lite.train(
        gemma, rows[:40], output_dir=tmp_path / "run", max_steps=2, learning_rate=1e-5,
        per_device_train_batch_size=4, gradient_accumulation_steps=1, eval_completions=0,
        sample_prompts=0, use_cpu=True,
    )  # fmt: skip
    assert [finding.name for finding in result.findings] == []
    assert 0 < result.metrics["eval_rmipo/pmi_chosen"] < 2  # with BOS in front, as it was trained
    prompt = rows[70]["prompt"]
    before = result.generate([prompt], max_new_tokens=4)
    loaded = rmipo_lite.load_run(tmp_path / "run")
    assert loaded.generate([prompt], max_new_tokens=4) == before
    loaded.merge(tmp_path / "merged")
    with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as tensors:
        dtypes = {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118 - no dict
    assert dtypes == {"BF16"}  # as the base model's files, though the run was in float32


def test_its_hidden_states_leave_float16(gemma: str, rows: Any, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gemma)
    model = AutoModelForCausalLM.from_pretrained(gemma, dtype=torch.float16)
    pairs = [
        TokenizedPair(number, *(tokenizer(row[side]).input_ids for side in _SIDES))
        for number, row in enumerate(rows[:2])
    ]
    args = RMiPOConfig(str(tmp_path), use_cpu=True)
    args.fp16, args.mixed_precision = True, "fp16"
    assert leaves_half(model, pairs)
    keep_model_in_range(model, pairs, args)
    assert args.weights_dtype == torch.float32
    assert not leaves_half(model, pairs)
