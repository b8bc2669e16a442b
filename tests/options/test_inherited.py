"""Every option of transformers is in one class, and a value that can't be is told by its name."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from rmipo_lite import RMiPOConfig
from rmipo_lite.options import inherited


def test_every_option_of_transformers_is_in_one_class() -> None:
    installed = {option.name for option in dataclasses.fields(TrainingArguments)}
    classes = [set(inherited.CHECKED), set(inherited.REFUSED), set(inherited.PASSED)]
    assert installed <= set().union(*classes), installed - set().union(*classes)
    assert sum(map(len, classes)) == len(set().union(*classes))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("max_steps", None, "max_steps must be a whole number, got None"),
        ("max_steps", 0, "-1 (whole epochs) or >= 1, got 0"),
        ("per_device_train_batch_size", 0, "a whole number >= 1, got 0"),
        ("num_train_epochs", float("nan"), "a number > 0, got nan"),
        ("save_total_limit", 0, ">= 1, or None to keep all, got 0"),
        ("weight_decay", "0.1", "weight_decay must be a number, got '0.1'"),
        ("eval_strategy", "stepz", "one of no, steps, epoch, got 'stepz'"),
        ("optim", "adamm", "optim must be one of"),
        ("report_to", ["tensorbord"], "report_to must be none, all or some of"),
        ("log_level", "loud", "log_level must be one of"),
        ("label_smoothing_factor", 0.1, "label_smoothing is the option of these losses"),
        ("torch_compile", True, "packed batches go past a compiled forward"),
        ("auto_find_batch_size", True, "max_tokens_per_microstep"),
        ("train_sampling_strategy", "batch_rebalance", "group_by_length, got 'batch_rebalance'"),
        ("lr_scheduler_type", "cosin", "lr_scheduler_type must be one of"),
        ("accelerator_config", "no.json", "no.json"),
        ("remove_unused_columns", True, "remove_unused_columns must be False"),
        ("fp16", True, "fp16 must be False on the CPU"),
        ("save_strategy", "best", "save_strategy='best' needs eval_strategy 'steps' or 'epoch'"),
        (
            "optim_target_modules",
            ["attn"],
            "optim_target_modules=['attn'] needs an optim of",
        ),
        ("dataloader_persistent_workers", True, "needs dataloader_num_workers >= 1"),
        ("dataloader_prefetch_factor", 2, "=2 needs dataloader_num_workers >= 1"),
        ("liger_kernel_config", {"rope": True}, "needs use_liger_kernel=True"),
        (
            "gradient_checkpointing_kwargs",
            {"junk": 1},
            "gradient_checkpointing_kwargs must be",
        ),
        ("gradient_checkpointing_kwargs", '{"junk": 1}', "use_reentrant, got {'junk': 1}"),
        (
            "accelerator_config",
            {"dispatch_batches": True},
            "dispatch_batches must be left out",
        ),
        ("accelerator_config", '{"split_batches": true}', "accelerator_config: split_batches must"),
        (
            "accelerator_config",
            AcceleratorConfig(gradient_accumulation_kwargs={"num_steps": 2}),
            "gradient_accumulation_kwargs must be left out (the batch is ours), got {'num",
        ),
    ],
)
def test_a_value_that_cannot_be_is_told(name: str, value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        RMiPOConfig("run", use_cpu=True, **{name: value})


def test_a_config_can_be_copied() -> None:
    config = RMiPOConfig("run", use_cpu=True, report_to=None)
    assert config.report_to == []
    dataclasses.replace(config)
    given = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.init}
    assert RMiPOConfig(**given).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    "options",
    [
        {"accelerator_config": {}},
        {"accelerator_config": AcceleratorConfig(even_batches=False, non_blocking=True)},
        {"accelerator_config": {"use_seedable_sampler": False, "dispatch_batches": False}},
        {"save_strategy": "best", "eval_strategy": "epoch", "metric_for_best_model": "loss"},
        {"optim_target_modules": "all-linear", "optim": "galore_adamw"},
        {"dataloader_persistent_workers": True, "dataloader_num_workers": 1},
        {"gradient_checkpointing_kwargs": {"use_reentrant": False, "preserve_rng_state": False}},
    ],
)
@pytest.mark.filterwarnings("ignore:.*checkpointing.* is deprecated:FutureWarning")
def test_what_has_a_meaning_is_taken(options: dict[str, Any]) -> None:
    RMiPOConfig("run", use_cpu=True, **options)


def test_liger_kernel_is_needed_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inherited, "is_liger_kernel_available", lambda: False)
    with pytest.raises(ValueError, match="use_liger_kernel=True needs the package liger-kernel"):
        RMiPOConfig("run", use_cpu=True, use_liger_kernel=True)
