"""A run whose model's layers are shared out among two and three processes is the run of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from rmipo_lite.checkpoints.sealed_folder import verify_checkpoint
from rmipo_lite.config import RMiPOConfig
from rmipo_lite.parallel.group import Group
from rmipo_lite.training import sharding
from rmipo_lite.training.sharding import decide_sharding, refuse_parts, seen_by_us_alone
from tests.kit import tiny_model
from tests.parallel import worker
from tests.parallel.launched import difference, launched, outcome_of

_SAVED = ("run", "again")
_BY_THREE = ("sharded_fewer", "sharded_ends")


@pytest.mark.slow
def test_a_sharded_run_is_that_of_one_process(tmp_path: Path) -> None:
    """One test, so that the processes are begun once."""
    by_two = [name for name in worker.SHARDED if name != "sharded_fewer"]
    worker.run(tmp_path / "1", [*worker.SHARDED])
    launched(2, tmp_path / "2", by_two)
    launched(3, tmp_path / "3", [*_BY_THREE])
    problems = {}
    for processes, names in ((2, by_two), (3, _BY_THREE)):
        for name in names:
            one = outcome_of(tmp_path / "1" / name)
            of_each = [outcome_of(tmp_path / str(processes) / name, r) for r in range(processes)]
            padded = name == "sharded_padded"
            problems[processes, name] = difference(one, of_each, 1e-5, padded=padded)
            assert all(outcome["parts"] for outcome in of_each), name
    assert {where: problem for where, problem in problems.items() if problem} == {}
    _goes_on_bit_for_bit_and_in_one_process(tmp_path)
    _is_an_adapter_that_peft_loads(tmp_path)


def _goes_on_bit_for_bit_and_in_one_process(folder: Path) -> None:
    whole, again = (outcome_of(folder / "2" / name) for name in ("sharded", "sharded_resumed"))
    assert all(torch.equal(again["weights"][name], w) for name, w in whole["weights"].items())
    verify_checkpoint(folder / "2" / "sharded" / "run" / "checkpoint-9")
    alone = folder / "alone"
    alone.mkdir()
    (alone / "sharded").symlink_to(folder / "2" / "sharded")
    worker.run(alone, ["sharded_resumed"])
    weights = outcome_of(alone / "sharded_resumed")["weights"]
    for name, weight in whole["weights"].items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-5)


def _is_an_adapter_that_peft_loads(folder: Path) -> None:
    saved = folder / "2" / "sharded" / "run" / "checkpoint-18"
    loaded = PeftModel.from_pretrained(tiny_model("llama"), str(saved))
    there = dict(loaded.named_parameters())
    for name, weight in outcome_of(folder / "2" / "sharded")["weights"].items():
        assert torch.equal(there[name], weight)
    assert load_file(saved / "optimizer.safetensors")
    folder = folder / "2" / "sharded_4bit"
    one, again = (load_file(folder / name / "adapter_model.safetensors") for name in _SAVED)
    assert all(torch.equal(again[name], weight) for name, weight in one.items())


def _two_asked_by(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes, and what their launcher put around them."""
    monkeypatch.setattr(sharding.Group, "current", lambda: Group(0, 2))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def _decided(args: RMiPOConfig) -> bool:
    decide_sharding(args)
    return bool(args.shards_layers)


def _args(tmp_path: Path, **options: Any) -> RMiPOConfig:
    return RMiPOConfig(str(tmp_path), use_cpu=True, **options)


@pytest.mark.parametrize(
    ("options", "environment", "wanted"),
    [
        ({"fsdp": True}, {"FSDP_VERSION": "1"}, None),  # the option has a version of its own
        ({}, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, None),
        ({}, {"ACCELERATE_USE_FSDP": "true"}, "version 1 is not supported, version 2 is"),
        ({"fsdp": True, "fsdp_config": {"version": 1}}, {}, "version 1 is not supported"),
        ({"fsdp": True, "fsdp_config": {"cpu_offload": True}}, {}, "offloading weights"),
        ({"fsdp": True, "optim": "adafactor"}, {}, "optim='adafactor' wants whole weights"),
        ({"fsdp": True, "loss_type": "dpo", "ref_sync_steps": 4}, {}, "a reference that moves"),
        ({}, {"ACCELERATE_USE_DEEPSPEED": "true"}, "deepspeed must be left out .* FSDP2"),
        ({"deepspeed": "zero3.json"}, {}, "deepspeed must be None .* FSDP2"),
    ],
)
def test_what_is_asked_for_is_done_or_refused(
    options: dict[str, Any],
    environment: dict[str, str],
    wanted: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _two_asked_by(environment, monkeypatch)
    if wanted is None:
        assert _decided(_args(tmp_path, **options))
    else:
        with pytest.raises(ValueError, match=wanted):
            _decided(_args(tmp_path, **options))


@pytest.mark.parametrize(
    ("options", "environment"),
    [
        ({"fsdp": True, "fsdp_config": {"activation_checkpointing": True}}, {}),
        (
            {},
            {
                "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2",
                "FSDP_ACTIVATION_CHECKPOINTING": "true",
            },
        ),
    ],
)  # fmt: skip
def test_its_own_checkpointing_is_ours(
    options: dict[str, Any],
    environment: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _two_asked_by(environment, monkeypatch)
    args = _args(tmp_path, **options)
    assert _decided(args)
    assert args.wants_checkpointing
    assert not args.checkpointing_is_open


def test_a_model_in_parts_is_no_start(tmp_path: Path) -> None:
    model = tiny_model("llama")
    vars(model)["_rmipo_lite_sharded"] = True
    with pytest.raises(ValueError, match="by an earlier run; load the folder"):
        refuse_parts(model)


def test_one_process_shares_with_nobody(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not _decided(_args(tmp_path))
    args = _args(tmp_path, fsdp=True)
    assert not _decided(args)
    assert not _decided(args)  # said once: train() decides, and so does the trainer
    assert capsys.readouterr().out == "fsdp: one process has nobody to share the model with\n"


def test_others_hear_nothing_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    args = _args(tmp_path, fsdp=True)
    with seen_by_us_alone(args):
        assert args.fsdp is None
        assert args.fsdp_plugin_args is None
        assert "ACCELERATE_USE_FSDP" not in sharding.os.environ
    assert args.fsdp is True
    assert sharding.os.environ["ACCELERATE_USE_FSDP"] == "true"
