from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from rmipo_lite.adapters import attach
from rmipo_lite.checkpoints.weights import save_weights
from rmipo_lite.config import RMiPOConfig
from rmipo_lite.model import loading, names
from rmipo_lite.planning import quantization
from rmipo_lite.step.pair_step import PairStep
from tests.kit import random_pairs, tiny_model, word_tokenizer


def _trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_an_adapter_that_lacks_a_weight_is_refused(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    args = RMiPOConfig(str(tmp_path / "out"), use_cpu=True)
    adapted = attach.attach_adapter(loading.load_model(str(tmp_path / "base"), args), "auto")
    save_weights(adapted, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if "v_proj.lora_B" in name)
    save_file({n: w for n, w in weights.items() if n != name}, file, metadata={"format": "pt"})
    with (
        pytest.warns(UserWarning, match="missing adapter keys"),
        pytest.raises(ValueError, match=f"lacks 1 of 28 weights; the first is {re.escape(name)}"),
    ):
        loading.load_model(str(tmp_path / "adapter"), args)


def test_an_adapter_folder_goes_on_training(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    args = RMiPOConfig(str(tmp_path / "run"))
    model = attach.attach_adapter(loading.load_model(str(tmp_path / "base"), args), "auto")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.01)
    model.save_pretrained(tmp_path / "adapter")
    loaded = loading.load_model(str(tmp_path / "adapter"), args)
    assert isinstance(loaded, PeftModel)
    ids = torch.arange(3, 9)[None]
    torch.testing.assert_close(loaded.eval()(ids).logits, model.eval()(ids).logits)
    assert _trainable(attach.attach_adapter(loaded, "auto")) == _trainable(model)


@pytest.mark.parametrize("word", ["8bit", "yes", 4])
def test_unknown_quantization(word: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="quantization must be 'auto', 'none', '4bit' or"):
        quantization.quantization_for("x", RMiPOConfig(str(tmp_path)), word)


def test_auto_stays_unquantised_on_the_cpu(tmp_path: Path) -> None:
    assert (
        quantization.quantization_for("x", RMiPOConfig(str(tmp_path), use_cpu=True), "auto") is None
    )


def _four_bit(tmp_path: Path) -> nn.Module:
    tiny_model("llama", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    args = RMiPOConfig(str(tmp_path / "run"))
    config = quantization.quantization_for(str(tmp_path / "base"), args, "4bit")
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
    model = attach.attach_adapter(_four_bit(tmp_path), "auto")
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
        ("\U00020000" * 300, "rmipo-" + "\U00020000" * 20),  # 80 bytes
        ("../../x", "rmipo-x"),
        ("/etc/passwd", "rmipo-passwd"),
        ("...hidden", "rmipo-hidden"),
    ],
)
def test_run_names_stay_in_their_folder(name: str, wanted: str) -> None:
    assert names.run_name(name) == wanted
    assert re.fullmatch(r"[\w.-]+", names.run_name(name))


@pytest.mark.parametrize(
    "name",
    ["./nope", "../a/b", "/no/such/folder", "a/b/c", "a\x00b", "x" * 5000, "~no-such-user/a"],
)
def test_a_missing_folder_is_called_that(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="model: there is no folder"):
        loading.load_model(name, RMiPOConfig(str(tmp_path)))
    with pytest.raises(FileNotFoundError, match="model: there is no folder"):
        loading.load_tokenizer(name)


# ---- folders from strangers -----------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base` (a model) and `adapter` (an adapter on it)."""
    root = tmp_path_factory.mktemp("saved")
    tiny_model().save_pretrained(root / "base")
    word_tokenizer().save_pretrained(root / "base")
    base = loading.load_model(str(root / "base"), RMiPOConfig(str(root / "run")))
    attach.attach_adapter(base, "auto").save_pretrained(root / "adapter")
    return root


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.marker,)


def edited(folder: Path, file: str, **changes: object) -> Path:
    path = folder / file
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(content | changes))
    return folder


@pytest.mark.parametrize("what", ["base", "adapter"])
def test_pickled_weights_are_refused_unread(what: str, saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved / what, tmp_path / what)
    (file,) = folder.glob("*.safetensors")
    file.unlink()
    args = RMiPOConfig(str(tmp_path / "run"))
    with pytest.raises((FileNotFoundError, ValueError), match=r"no weights: wanted .*safetensors"):
        loading.load_model(str(folder), args)
    name = {"base": "pytorch_model.bin", "adapter": "adapter_model.bin"}[what]
    torch.save(Bomb(tmp_path / "marker"), folder / name)
    with pytest.raises(ValueError, match=rf"as a pickle alone \({name}\)"):
        loading.load_model(str(folder), args)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("shard", ["../model.safetensors", "/x/y.safetensors", "model.bin"])
def test_shards_outside_the_folder_are_refused(shard: str, saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved / "base", tmp_path / "base")
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    edited(folder, "model.safetensors.index.json", weight_map={"lm_head.weight": shard})
    with pytest.raises(ValueError, match=r"wanted \*\.safetensors files beside it"):
        loading.load_model(str(folder), RMiPOConfig(str(tmp_path / "run")))


def test_code_of_a_folder_is_not_run_and_nobody_is_asked(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    folder = shutil.copytree(saved / "base", tmp_path / "base")
    (folder / "code.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')")
    maps = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
    edited(folder, "config.json", model_type="own", auto_map=maps)
    with pytest.raises(ValueError, match=r"code of its own, which is never run .* pass the object"):
        loading.load_model(str(folder), RMiPOConfig(str(tmp_path / "run")))
    edited(
        folder,
        "tokenizer_config.json",
        tokenizer_class="T",
        auto_map={"AutoTokenizer": [None, "code.T"]},
    )
    with pytest.raises(ValueError, match=r"tokenizer: .* comes with code of its own"):
        loading.load_tokenizer(str(folder))
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model_name_or_path": None}, "names no base model"),
        ({"base_model_name_or_path": "{adapter}"}, "is an adapter itself; merge that one first"),
        ({"base_model_name_or_path": "../no"}, "there is no folder '../no'"),
        ({"megatron_config": {"a": 1}, "megatron_core": "os"}, "asks for Megatron's layers"),
    ],
)
def test_an_adapters_own_file_is_read_with_care(
    changes: dict[str, object], message: str, saved: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(saved / "adapter", tmp_path / "adapter")
    words = {k: str(folder) if v == "{adapter}" else v for k, v in changes.items()}
    edited(folder, "adapter_config.json", **words)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        loading.load_model(str(folder), RMiPOConfig(str(tmp_path / "run")))


@pytest.mark.parametrize("content", ["{", "[]", "\xff"])
def test_a_broken_adapter_config_is_named(content: str, saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved / "adapter", tmp_path / "adapter")
    (folder / "adapter_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"adapter_config\.json (is not readable JSON|holds no)"):
        loading.load_model(str(folder), RMiPOConfig(str(tmp_path / "run")))


def test_what_a_library_says_is_cut_short(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved / "base", tmp_path / "base")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(
        ValueError, match=r"model: .* could not be loaded \(SafetensorError"
    ) as told:
        loading.load_model(str(folder), RMiPOConfig(str(tmp_path / "run")))
    assert len(str(told.value)) < 500
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        loading.load_model(str(tmp_path / "none"), RMiPOConfig(str(tmp_path / "run")))
    with pytest.raises(ValueError, match=r"tokenizer: .* Pass one: tokenizer= of train"):
        loading.load_tokenizer(str(tmp_path / "none"))


def test_a_folder_may_be_named_from_home(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(saved))
    assert loading.load_model("~/base", RMiPOConfig(str(tmp_path / "run"))) is not None
    assert loading.load_tokenizer("~/base").eos_token == "</s>"
