"""The log of a run: means over pairs that counted, recomputable from the file of pair values."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rmipo_lite.training.run_log import PAIR_VALUES_FILE
from tests.kit import random_pairs, tiny_trainer, word_tokenizer

NAMES = {"loss": "loss", "logps/chosen": "chosen_logps", "rmipo/gamma": "gamma"}


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / PAIR_VALUES_FILE).read_text().splitlines()]


def _logs(trainer: Any) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_log_lines_are_the_means_of_the_file(tmp_path: Path) -> None:
    trainer = tiny_trainer(
        tmp_path, save_pair_values=True, logging_steps=2, max_tokens_per_microstep=30, count=7
    )
    trainer.train()
    pairs = _lines(tmp_path)
    assert len(pairs) == 14  # 4 + 3 + 4 + 3: the short batch weighs by its pairs
    for entry in _logs(trainer):
        mine = [pair for pair in pairs if entry["step"] - 1 <= pair["step"] <= entry["step"]]
        for name, key in NAMES.items():
            mean = sum(pair[key] for pair in mine) / len(mine)
            assert entry[name] == pytest.approx(mean, abs=1e-6)
    undefined = [pair for pair in pairs if pair["chosen_pmi"] is None]
    assert {pair["row"] for pair in undefined} == {1}  # its responses have one token


def test_length_balance_weighs_the_loss_and_nothing_else(tmp_path: Path) -> None:
    """The weights are in the file; the loss of a step is their mean, metrics are plain means."""
    trainer = tiny_trainer(
        tmp_path, save_pair_values=True, length_balance="auto", max_tokens_per_microstep=30,
        eval_pairs=random_pairs(4, seed=9),
    )  # fmt: skip
    assert trainer.length_balance.is_used
    bare = tiny_trainer(tmp_path / "bare", eval_pairs=random_pairs(4, seed=9))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(bare.evaluate()["eval_loss"])
    trainer.train()
    for entry in _logs(trainer):
        mine = [pair for pair in _lines(tmp_path) if pair["step"] == entry["step"]]
        weights = [pair["weight"] for pair in mine]
        assert len(set(weights)) > 1
        weighted = sum(w * pair["loss"] for w, pair in zip(weights, mine, strict=True))
        assert entry["loss"] == pytest.approx(weighted / len(mine), abs=1e-6)
        assert entry["rmipo/pair_loss"] == pytest.approx(
            sum(pair["loss"] for pair in mine) / len(mine), abs=1e-6
        )
        plain = sum(pair["chosen_logps"] for pair in mine) / len(mine)
        assert entry["logps/chosen"] == pytest.approx(plain, abs=1e-6)
        squares = sum(w * w for w in weights)
        share = sum(weights) ** 2 / (len(weights) * squares)
        assert entry["rmipo/effective_sample"] == pytest.approx(share)


@pytest.mark.parametrize("pairs_of_a_step", [1, 4])
def test_the_loss_is_what_the_file_and_the_options_make(
    pairs_of_a_step: int, tmp_path: Path
) -> None:
    """Weights, likelihood, the end's anchor, all from the lines; of one pair a weight acts too."""
    end = word_tokenizer().eos_token_id
    pairs = [
        replace(pair, chosen_ids=[*pair.chosen_ids, end], rejected_ids=[*pair.rejected_ids, end])
        for pair in random_pairs(8)
    ]
    trainer = tiny_trainer(
        tmp_path, pairs=pairs, save_pair_values=True, length_balance="auto", sft_weight=0.5,
        end_anchor=0.2, per_device_train_batch_size=pairs_of_a_step, max_steps=3,
    )  # fmt: skip
    trainer.train()
    assert trainer.length_balance.is_used
    for entry in _logs(trainer):
        mine = [pair for pair in _lines(tmp_path) if pair["step"] == entry["step"]]
        assert len(mine) == pairs_of_a_step
        assert any(abs(pair["weight"] - 1) > 0.01 for pair in mine)
        wanted = sum(p["weight"] * (p["loss"] + 0.2 * p["end_nll"]) for p in mine) / len(mine)
        tokens = sum(p["chosen_length"] for p in mine)
        wanted -= 0.5 * sum(p["chosen_logps"] * p["chosen_length"] for p in mine) / tokens
        assert entry["loss"] == pytest.approx(wanted, abs=1e-5)
        ends = sum(pair["end_nll"] for pair in mine) / len(mine)
        assert entry["rmipo/end_nll"] == pytest.approx(ends, abs=1e-5)


@pytest.mark.parametrize("stop", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3))])
def test_a_resumed_run_logs_the_same_lines(stop: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_pair_values": True, "logging_steps": 3, "max_steps": 7}
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 9}
    whole = tiny_trainer(tmp_path, **options, **saving)
    whole.train()
    expected = _lines(tmp_path)
    # Lines of steps that are about to run again, and one that was cut by a kill.
    with (tmp_path / PAIR_VALUES_FILE).open("a") as file:
        file.write('{"step": 7, "ro')
    resumed = tiny_trainer(tmp_path, **options)
    output = resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    timeless = {"grad_norm", "num_tokens", *NAMES}
    for ours, theirs in zip(_logs(resumed), _logs(whole), strict=True):
        assert {n: ours[n] for n in timeless} == {n: theirs[n] for n in timeless}
    assert _lines(tmp_path) == expected
    assert output.training_loss == whole.state.log_history[-1]["train_loss"]


def test_a_second_run_of_the_same_trainer_counts_from_zero(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, pairs=random_pairs(4), max_steps=1)
    tokens = []
    for _ in range(2):
        trainer.train()
        tokens.append(_logs(trainer)[-1]["num_tokens"])
    assert tokens[0] == tokens[1]


def test_a_line_tells_its_seconds_its_tokens_and_the_peak(tmp_path: Path) -> None:
    """Seconds of steps alone: an evaluation between two lines isn't counted."""
    trainer = tiny_trainer(tmp_path, logging_steps=1, eval_pairs=random_pairs(4, seed=9),
                           eval_strategy="steps", eval_steps=1)  # fmt: skip
    slow = trainer.evaluation_loop

    def evaluation_loop(*args: Any, **kwargs: Any) -> Any:
        time.sleep(1.0)
        return slow(*args, **kwargs)

    trainer.evaluation_loop = evaluation_loop
    began = time.perf_counter()
    trainer.train()
    whole = time.perf_counter() - began
    logs = _logs(trainer)
    seconds = [entry["rmipo/step_runtime"] for entry in logs]
    assert all(one > 0 for one in seconds)
    assert sum(seconds) < whole - len(logs) * 1.0
    tokens = sum(e["rmipo/tokens_per_second"] * e["rmipo/step_runtime"] for e in logs)
    assert tokens == pytest.approx(logs[-1]["num_tokens"])
    peaks = [entry["rmipo/peak_memory"] for entry in logs]
    assert 0 < peaks[0] <= peaks[-1] < 1024  # GiB
