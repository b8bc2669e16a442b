from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from rmipo_lite.config import RMiPOConfig, own_option_names


def test_defaults_of_the_design(tmp_path: Path) -> None:
    args = RMiPOConfig(str(tmp_path))
    assert (args.loss_type, args.beta, args.gamma_min, args.gamma_max) == ("rmipo", 2.0, 0.3, 1.6)
    assert (args.learning_rate, args.num_train_epochs, args.warmup_steps) == ("auto", 1.0, 0.1)
    assert args.lr_scheduler_type == "cosine"
    assert args.pairs_per_step == 32
    assert args.max_length == 1024
    assert not args.gamma_scaled_by_beta
    assert args.disable_dropout
    assert not args.logging_nan_inf_filter
    assert args.report_to == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0}, "beta must be a number > 0, got 0"),
        ({"loss_type": "nope"}, "loss_type must be one of rmipo, simpo, hinge, simper, dpo, "),
        (
            {"gamma_min": 2},
            "gamma_min must be at most gamma_max = 1.6, got 2",
        ),
        ({"gamma_max": float("nan")}, "gamma_max must be a number >= 0, got nan"),
        ({"label_smoothing": 0.5}, "label_smoothing must be in [0, 0.5), got 0.5"),
        (
            {"label_smoothing": 0.1, "loss_type": "hinge"},
            "label_smoothing must be 0 for loss_type='hinge'",
        ),
        ({"sft_weight": -1}, "sft_weight must be >= 0, got -1"),
        (
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-6}},
            "lr_scheduler_kwargs must be without min_lr (a rate of its own)",
        ),
        ({"prior": "frozen"}, "prior must be live, cached or refresh: and a number"),
        ({"prior": "refresh:0"}, "as refresh:200, got 'refresh:0'"),
        ({"prior_context": "eos"}, "prior_context must be one of auto, none, bos"),
        ({"max_length": 0}, "max_length must be None or a whole number >= 1, got 0"),
        ({"max_tokens_per_microstep": "many"}, "max_tokens_per_microstep must be 'auto' or"),
        ({"tokenization": "authors", "max_prompt_length": 64}, "packing must be False"),
        ({"tokenization": "authors", "packing": False}, "max_prompt_length must be a number"),
        ({"lora_r": 0}, "lora_r must be None or a whole number >= 1, got 0"),
        ({"lora_alpha": -1.0}, "lora_alpha must be None or > 0, got -1.0"),
        ({"lora_dropout": 1.0}, "lora_dropout must be None or in [0, 1), got 1.0"),
        ({"lora_dropout": 0.1}, "lora_dropout must be 0 while disable_dropout=True"),
        ({"target_modules": []}, "target_modules must be names of layers, got []"),
        ({"logging_nan_inf_filter": True}, "logging_nan_inf_filter must be False"),
        ({"remove_unused_columns": True}, "remove_unused_columns must be False"),
        ({"kernel_impl": "cuda"}, "kernel_impl must be one of auto, native, torch"),
    ],
)
def test_nonsense_is_refused_by_name(options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        RMiPOConfig(str(tmp_path), **options)


def test_bf16_on_a_cpu_needs_no_other_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    args = RMiPOConfig(str(tmp_path), bf16=True)
    assert (args.dtype, args.device.type, args.use_cpu) == (torch.bfloat16, "cpu", False)


def test_a_number_as_text_is_a_number(tmp_path: Path) -> None:
    """The command line and YAML hand numbers over as text."""
    assert (
        RMiPOConfig(str(tmp_path), max_tokens_per_microstep="512").max_tokens_per_microstep == 512
    )


def test_a_number_of_numpys_is_pythons_own(tmp_path: Path) -> None:
    """Neither JSON, which checkpoints are written in, nor a seed takes another."""
    given = {
        "max_steps": np.int64(2), "logging_steps": np.int64(1), "learning_rate": np.float32(0.25),
        "beta": np.float64(3), "seed": np.int64(3), "packing": np.bool_(False),
        "lr_scheduler_kwargs": {"min_lr": np.float32(0.5)},
    }  # fmt: skip
    args = RMiPOConfig(str(tmp_path), **given)
    assert [getattr(args, name) for name in given] == [2, 1, 0.25, 3.0, 3, False, {"min_lr": 0.5}]
    kinds = [type(getattr(args, name)) for name in given]
    assert kinds == [int, int, float, float, int, bool, dict]
    json.dumps(args.to_dict())


def test_every_own_option_is_explained() -> None:
    fields = RMiPOConfig.__dataclass_fields__
    for name in own_option_names():
        assert fields[name].metadata["help"], name
