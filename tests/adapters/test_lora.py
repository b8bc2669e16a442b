"""Which adapter a run attaches, by its options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import IA3Config, LoraConfig, PeftModel

from rmipo_lite.adapters.attach import attach_adapter
from rmipo_lite.adapters.lora import adapter_config, lora_config
from rmipo_lite.config import RMiPOConfig
from tests.kit import tiny_model, train_words


def _args(tmp_path: Path, **options: Any) -> RMiPOConfig:
    return RMiPOConfig(str(tmp_path), **options)


def _attached(tmp_path: Path, peft_config: Any = "auto", **options: Any) -> LoraConfig:
    model: Any = attach_adapter(tiny_model("llama"), peft_config, _args(tmp_path, **options))
    config: LoraConfig = model.active_peft_config
    return config


def test_the_options_are_the_adapters(tmp_path: Path) -> None:
    default = _attached(tmp_path)
    assert (default.r, default.lora_alpha, default.lora_dropout) == (16, 32, 0.0)
    one = _attached(tmp_path, lora_r=8)
    assert (one.r, one.lora_alpha) == (8, 16)
    assert one.target_modules == default.target_modules
    four = _attached(
        tmp_path, "new", lora_r=4, lora_alpha=4.0, lora_dropout=0.25, disable_dropout=False,
        target_modules="q_proj, v_proj",
    )  # fmt: skip
    assert (four.r, four.lora_alpha, four.lora_dropout) == (4, 4.0, 0.25)
    assert four.target_modules == {"q_proj", "v_proj"}
    assert _attached(tmp_path, target_modules=["q_proj"]).target_modules == {"q_proj"}
    expression = r".*\.0\..*(q|v)_proj"  # peft's own
    assert _attached(tmp_path, target_modules=expression).target_modules == expression


def test_a_dict_is_a_peft_config(tmp_path: Path) -> None:
    assert adapter_config({"r": 8}, _args(tmp_path)) == lora_config(r=8)
    assert _attached(tmp_path, {"r": 8, "lora_alpha": 8}).lora_alpha == 8
    ia3 = adapter_config({"peft_type": "ia3"}, _args(tmp_path))
    assert isinstance(ia3, IA3Config)
    for wrong, words in (
        ({"rank": 8}, "unexpected keyword argument 'rank'"),
        ({"peft_type": "magic"}, "peft has no peft_type 'MAGIC'"),
    ):
        with pytest.raises(ValueError, match=r"^peft_config: ") as caught:
            adapter_config(wrong, _args(tmp_path))
        assert words in str(caught.value)


@pytest.mark.parametrize("peft_config", [None, LoraConfig(), {"r": 8}])
def test_two_places_are_refused(peft_config: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^lora_r, lora_alpha: peft_config is .* not be heard"):
        attach_adapter(tiny_model(), peft_config, _args(tmp_path, lora_r=8, lora_alpha=8.0))


def test_an_adapter_that_goes_on_is_not_another(tmp_path: Path) -> None:
    model = attach_adapter(tiny_model("llama"), "auto", _args(tmp_path, lora_r=8))
    for same in ({}, {"lora_r": 8}, {"target_modules": "all-linear"}):
        assert attach_adapter(model, "auto", _args(tmp_path, **same)) is model
    with pytest.raises(ValueError, match=r"^lora_r: the model has an adapter .* is 8 and not 16"):
        attach_adapter(model, "auto", _args(tmp_path, lora_r=16))
    with pytest.raises(ValueError, match=r"^target_modules: the model has an adapter"):
        attach_adapter(model, "auto", _args(tmp_path, target_modules="q_proj"))
    fresh = attach_adapter(model, "new", _args(tmp_path, lora_r=16))
    assert isinstance(fresh, PeftModel)
    assert fresh.active_peft_config.r == 16


def test_train_takes_them(tmp_path: Path) -> None:
    result = train_words(tiny_model("llama"), tmp_path, lora_r=2, target_modules="q_proj,v_proj")
    config = result.model.active_peft_config
    assert (config.r, config.lora_alpha, config.target_modules) == (2, 4, {"q_proj", "v_proj"})
