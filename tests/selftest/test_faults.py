"""Faults planted in the package, each found by the self-test's own check."""

from __future__ import annotations

import itertools
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rmipo_lite.model import head
from rmipo_lite.ops import head_blocks, native
from rmipo_lite.selftest import models, survival
from rmipo_lite.selftest.check import Lost
from rmipo_lite.selftest.processes import run_job
from rmipo_lite.step import pair_step


@pytest.mark.parametrize("number", [4, 12, 22, 24, 31])
def test_the_checks_hold(number: int, try_check) -> None:
    assert [loss[:2] for loss in try_check(number).losses] == []


def test_another_log_prob_is_found(try_check, monkeypatch: pytest.MonkeyPatch) -> None:
    real = head_blocks._Sums.logps
    monkeypatch.setattr(head_blocks._Sums, "logps", lambda self: real(self) + 1e-3)
    assert len(try_check(4).losses) > 3


def test_a_gradient_of_another_size_is_found(try_check, monkeypatch: pytest.MonkeyPatch) -> None:
    real = native.pair_losses

    def pair_losses(*arguments):
        parts = real(*arguments)
        return parts._replace(mean_grads=parts.mean_grads * 1.001)

    monkeypatch.setattr(native, "pair_losses", pair_losses)
    assert len(try_check(4).losses) >= 6


def test_the_other_place_of_gamma_is_found(try_check, monkeypatch: pytest.MonkeyPatch) -> None:
    real = pair_step.losses

    def losses(token_logps, cu_seqlens, prior, args, *others):
        inside = replace(args, gamma_scaled_by_beta=True)
        return real(token_logps, cu_seqlens, prior, inside, *others)

    monkeypatch.setattr(pair_step, "losses", losses)
    outcome = try_check(12)
    assert len(outcome.losses) == outcome.trials


def test_scales_and_softcaps_that_are_not_read_are_found(
    try_check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "head_conventions", lambda config: (None, 1.0))
    names = [loss[0] for loss in try_check(31).losses]
    assert names == ["gemma2", "granite", "softcap and LoRA on the head"]


def test_packed_rows_that_differ_are_found(try_check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "packing_problem", lambda *_: "0.1 nats")
    outcome = try_check(31)
    assert len(outcome.losses) == outcome.trials


def test_another_result_each_time_is_found(try_check, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = pair_step.losses, itertools.count()

    def losses(*arguments):
        out, rewards = real(*arguments)
        return out._replace(loss=out.loss * (1 + next(calls) / 1000)), rewards

    monkeypatch.setattr(pair_step, "losses", losses)
    assert "three steps of training" in [loss[0] for loss in try_check(24).losses]


def test_a_run_that_did_not_keep_what_it_saved_is_found(tmp_path: Path) -> None:
    with pytest.raises(Lost, match="were saved, the newest checkpoint has 0"):
        survival.expect_resumes(tmp_path, -9, "saved 3.\n", {})
    with pytest.raises(Lost, match="ended by itself"):
        survival.expect_resumes(tmp_path, 1, "", {})


def test_other_weights_are_found(tmp_path: Path) -> None:
    weights = {"a": torch.zeros(1)}
    with pytest.raises(Lost, match="the weights differ"):
        survival.expect_resumes(tmp_path, -9, "", weights)


@pytest.mark.slow
def test_a_hung_worker_is_found_and_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_job(os.getcwd, output=tmp_path / "first")  # the server has imported all of it then
    monkeypatch.setattr(survival, "parent_with_workers", hangs)
    with pytest.raises(TimeoutError, match="hung for more than 3 s"):
        survival.expect_no_hang("fork", tmp_path / "out", seconds=3)


def hangs(kind: str) -> None:
    if os.fork() == 0:
        time.sleep(600)
    time.sleep(600)
