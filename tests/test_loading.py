from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import nn

from rmipo_lite import loading
from rmipo_lite.config import RMiPOConfig
from rmipo_lite.step import PairStep
from tests.tiny import random_pairs, tiny_model


def _trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_default_adapter_is_every_linear_layer_but_the_head() -> None:
    model = loading.attach_adapter(tiny_model(), "auto")
    targets = model.peft_config["default"].target_modules
    assert {target.rsplit(".", 1)[-1] for target in targets} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert model.peft_config["default"].r == 16
    assert model.peft_config["default"].lora_alpha == 32
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_a_second_call_goes_on_with_the_adapter_and_never_nests() -> None:
    base = tiny_model()
    first = loading.attach_adapter(base, "auto")
    size = _trainable(first)
    assert loading.attach_adapter(base, "auto") is first
    assert loading.attach_adapter(first, "auto") is first
    assert loading.attach_adapter(first, None) is first
    assert _trainable(first) == size


def test_new_replaces_the_adapter() -> None:
    base = tiny_model()
    first = loading.attach_adapter(base, "auto")
    with torch.no_grad():
        for name, parameter in first.named_parameters():
            if "lora_B" in name:
                parameter.fill_(1.0)
    second = loading.attach_adapter(first, "new")
    assert second is not first
    assert _trainable(second) == _trainable(loading.attach_adapter(tiny_model(), "auto"))
    assert all(p.abs().max() == 0 for n, p in second.named_parameters() if "lora_B" in n)
    third = loading.attach_adapter(second, LoraConfig(r=2, target_modules=["q_proj"]))
    assert third.peft_config["default"].r == 2


def test_layers_of_an_unknown_adapter_are_refused() -> None:
    from peft import get_peft_model

    base = tiny_model()
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="pass the PeftModel that get_peft_model returned"):
        loading.attach_adapter(base, "auto")


def test_unknown_word_for_the_adapter() -> None:
    with pytest.raises(
        ValueError, match="peft_config must be 'auto', 'new', None or a peft config"
    ):
        loading.attach_adapter(tiny_model(), "fresh")


def test_an_adapter_folder_goes_on_training(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    args = RMiPOConfig(str(tmp_path / "run"))
    model = loading.attach_adapter(loading.load_model(str(tmp_path / "base"), args), "auto")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.01)
    model.save_pretrained(tmp_path / "adapter")
    loaded = loading.load_model(str(tmp_path / "adapter"), args)
    assert isinstance(loaded, PeftModel)
    ids = torch.arange(3, 9)[None]
    torch.testing.assert_close(loaded.eval()(ids).logits, model.eval()(ids).logits)
    assert _trainable(loading.attach_adapter(loaded, "auto")) == _trainable(model)


@pytest.mark.parametrize("word", ["8bit", "yes", 4])
def test_unknown_quantization(word: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="quantization must be 'auto', 'none', '4bit' or"):
        loading.quantization_for("x", RMiPOConfig(str(tmp_path)), word)


def test_auto_stays_unquantised_on_the_cpu(tmp_path: Path) -> None:
    assert loading.quantization_for("x", RMiPOConfig(str(tmp_path), use_cpu=True), "auto") is None


def _four_bit(tmp_path: Path) -> nn.Module:
    tiny_model("llama", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    args = RMiPOConfig(str(tmp_path / "run"))
    config = loading.quantization_for(str(tmp_path / "base"), args, "4bit")
    return loading.load_model(str(tmp_path / "base"), args, config)


def test_four_bit_is_nf4_with_double_quantisation(tmp_path: Path) -> None:
    model = _four_bit(tmp_path)
    layer = model.model.layers[0].mlp.up_proj
    assert type(layer).__name__ == "Linear4bit"
    assert layer.weight.quant_state.quant_type == "nf4"
    assert layer.weight.quant_state.nested
    assert not layer.support_avx512bf16_for_cpu


@pytest.mark.parametrize("packing", [True, False])
def test_every_lora_tensor_has_a_gradient_after_an_evaluation(
    packing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bitsandbytes repacks 4-bit weights in an eval-mode pass; 4 of 14 gradients were left then.

    It does so on CPUs with AVX512-BF16, so this one is made to say it has that.
    """
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    model = loading.attach_adapter(_four_bit(tmp_path), "auto")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02)
    step = PairStep(model, RMiPOConfig(str(tmp_path / "run")), 10**6, packing)
    pairs = random_pairs(4)

    def gradients() -> dict[str, torch.Tensor | None]:
        model.train()
        model.zero_grad()
        step.train(pairs, lambda loss: loss.backward())
        return {n: p.grad for n, p in model.named_parameters() if "lora_" in n}

    before = gradients()
    model.eval()
    list(step.evaluate(pairs))
    after = gradients()
    assert len(after) == 2 * 7 * 2
    assert [n for n, g in after.items() if g is None or not g.abs().max() > 0] == []
    for name, gradient in before.items():
        torch.testing.assert_close(after[name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", "rmipo-Qwen2.5-0.5B-Instruct"),
        ("a/b/", "rmipo-b"),
        ("..", "rmipo-model"),
        ("x" * 300, "rmipo-" + "x" * 80),
        ("we ird\x00name", "rmipo-we-ird-name"),
    ],
)
def test_run_names_stay_in_their_folder(name: str, wanted: str) -> None:
    assert loading.run_name(name) == wanted
    assert re.fullmatch(r"[\w.-]+", loading.run_name(name))


@pytest.mark.parametrize("name", ["./nope", "../a/b", "/no/such/folder", "a/b/c"])
def test_a_missing_folder_is_called_that(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="model: there is no folder"):
        loading.load_model(name, RMiPOConfig(str(tmp_path)))
    with pytest.raises(FileNotFoundError, match="model: there is no folder"):
        loading.load_tokenizer(name)
