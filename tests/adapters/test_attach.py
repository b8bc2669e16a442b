"""What may be trained is trained whole; what may not is refused by name, before anything."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftMixedModel, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from rmipo_lite.adapters.attach import attach_adapter, detach_adapter
from rmipo_lite.adapters.start import adapter_off
from tests.kit import tiny_model


def _lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **options})


def _trained(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def _count(model: Any) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_default_adapter_is_every_linear_layer_but_the_head() -> None:
    model = attach_adapter(tiny_model(), "auto")
    targets = model.peft_config["default"].target_modules
    assert {target.rsplit(".", 1)[-1] for target in targets} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert model.peft_config["default"].r == 16
    assert model.peft_config["default"].lora_alpha == 32
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_a_second_call_goes_on_with_the_adapter_and_never_nests() -> None:
    base = tiny_model()
    first = attach_adapter(base, "auto")
    size = _count(first)
    assert attach_adapter(base, "auto") is first
    assert attach_adapter(first, "auto") is first
    assert attach_adapter(first, None) is first
    assert _count(first) == size


def test_new_replaces_the_adapter() -> None:
    base = tiny_model()
    first = attach_adapter(base, "auto")
    with torch.no_grad():
        for name, parameter in first.named_parameters():
            if "lora_B" in name:
                parameter.fill_(1.0)
    second = attach_adapter(first, "new")
    assert second is not first
    assert _count(second) == _count(attach_adapter(tiny_model(), "auto"))
    assert all(p.abs().max() == 0 for n, p in second.named_parameters() if "lora_B" in n)
    third = attach_adapter(second, LoraConfig(r=2, target_modules=["q_proj"]))
    assert third.peft_config["default"].r == 2


def test_layers_of_an_unknown_adapter_are_refused() -> None:
    base = tiny_model()
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="pass the PeftModel that get_peft_model returned"):
        attach_adapter(base, "auto")


def test_unknown_word_for_the_adapter() -> None:
    for wrong in ("fresh", ["r"], 7):
        with pytest.raises(
            ValueError, match="peft_config must be 'auto', 'new', None or a peft config, got"
        ):
            attach_adapter(tiny_model(), wrong)  # type: ignore[arg-type]


def test_layers_that_the_model_has_not_are_told_with_those_it_has() -> None:
    with pytest.raises(
        ValueError, match=r"peft_config: .*'query'.* are called down_proj, .*q_proj"
    ):
        attach_adapter(tiny_model(), LoraConfig(target_modules=["query"]))


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings:UserWarning")
def test_lora_on_tied_ends_is_refused_and_taken_off(target: str) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    config = LoraConfig(r=2, target_modules=["q_proj", target])
    with pytest.raises(ValueError, match=f"LoRA on .*{target}, but embedding and head are tied"):
        attach_adapter(model, config)
    assert not [name for name, _ in model.named_modules() if "lora" in name]
    assert attach_adapter(model, "auto")
    untied = tiny_model("llama", tie_word_embeddings=False)
    assert attach_adapter(untied, config)


@pytest.mark.filterwarnings("ignore:Adapter 'default'. 2 LoRA tensor")  # lora_bias: peft's
@pytest.mark.parametrize(
    "config",
    [
        _lora(),
        _lora(modules_to_save=["norm"]),
        _lora(trainable_token_indices=[3, 4]),
        _lora(bias="all"),
        _lora(use_dora=True),
        _lora(lora_bias=True),
        peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
        peft.VeraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    ],
)
def test_a_frozen_adapter_goes_on_whole(config: peft.PeftConfig, tmp_path: Path) -> None:
    tiny_model("qwen2").save_pretrained(tmp_path / "base")

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base")

    get_peft_model(base(), config).save_pretrained(tmp_path / "adapter")
    want = _trained(PeftModel.from_pretrained(base(), tmp_path / "adapter", is_trainable=True))
    frozen = PeftModel.from_pretrained(base(), tmp_path / "adapter")
    assert _trained(attach_adapter(frozen, "auto")) == want


def test_what_somebody_froze_stays_frozen() -> None:
    model = get_peft_model(tiny_model("llama"), _lora())
    first = next(name for name in _trained(model))
    model.get_parameter(first).requires_grad_(False)
    assert first not in _trained(attach_adapter(model, "auto"))


def _two_active(model: Any) -> Any:
    adapted = get_peft_model(model, _lora())
    adapted.add_adapter("other", _lora())
    adapted.base_model.set_adapter(["default", "other"])
    return adapted


def _merged(model: Any) -> Any:
    adapted = get_peft_model(model, _lora())
    adapted.merge_adapter()
    return adapted


def _off(model: Any) -> Any:
    adapted = get_peft_model(model, _lora())
    adapted.disable_adapter_layers()
    return adapted


def _frozen(model: Any) -> Any:
    return get_peft_model(model, _lora()).requires_grad_(False)


def _base_trained_too(model: Any) -> Any:
    adapted = get_peft_model(model, _lora())
    model.model.norm.weight.requires_grad_(True)
    return adapted


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_two_active, "2 adapters are active"),
        (_merged, "default is merged into the weights"),
        (_off, "its adapters are switched off"),
        (_frozen, "every weight of its adapter 'default' is frozen"),
        (_base_trained_too, "would be trained and not saved"),
        (lambda m: get_peft_model(m, _lora(init_lora_weights="pissa")), "nobody knows here"),
        (lambda m: get_peft_model(get_peft_model(m, _lora()), _lora()), "inside another one"),
        (lambda m: PeftMixedModel(m, _lora()), "several kinds at once"),
        (
            lambda m: get_peft_model(
                m, peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
            ),
            "PromptTuningConfig (PROMPT_TUNING): it puts learnt tokens before every text",
        ),
    ],
)
def test_a_model_in_no_state_to_be_trained_is_refused(make: Any, words: str) -> None:
    model = make(tiny_model("llama"))
    with pytest.raises((ValueError, TypeError), match=re.escape(words)):
        attach_adapter(model, "auto")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (_lora(inference_mode=True), "inference_mode=True makes an adapter that can't be trained"),
        (_lora(init_lora_weights="pissa", use_dora=True), "DoRA can't be saved apart"),
        (_lora(target_modules=["nowhere"]), "The model's linear layers are called"),
        (peft.AdaLoraConfig(total_step=5, target_modules=["q_proj"]), "its ranks change"),
        (_lora(layer_replication=[[0, 2], [1, 2]]), "it repeats layers of the model"),
        (
            _lora(init_lora_weights="eva", eva_config=peft.EvaConfig()),
            "'eva' needs a pass over data first",
        ),
    ],
)
def test_a_config_that_cannot_be_trained_is_refused(config: Any, words: str) -> None:
    model = tiny_model("llama")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(ValueError, match=re.escape(words)):
        attach_adapter(model, config)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_nothing_to_train_is_said() -> None:
    with pytest.raises(ValueError, match="every weight is frozen"):
        attach_adapter(tiny_model("llama").requires_grad_(False), None)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_taken_off_the_base_is_what_it_was(start: str) -> None:
    model = tiny_model("llama")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    adapted = attach_adapter(model, _lora(init_lora_weights=start))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1)
    after = detach_adapter(adapted).state_dict()
    assert after.keys() == before.keys()
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_of_the_base_are_taken_back(bias: str) -> None:
    model = tiny_model("qwen2")  # whose attention has biases
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    adapted = attach_adapter(model, _lora(bias=bias))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    with adapter_off(adapted):
        own = dict(adapted.named_parameters())
        assert torch.equal(
            own["base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias"],
            before["model.layers.0.self_attn.q_proj.bias"],
        )
    after = detach_adapter(adapted).state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_a_start_that_takes_from_sixteen_bits_is_refused() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"'pissa' .* rounded in torch\.bfloat16.*in float32"):
        attach_adapter(model, _lora(init_lora_weights="pissa"))
    assert attach_adapter(model, _lora())


def _merged_in(model: Any) -> Any:
    return get_peft_model(model, _lora(init_lora_weights=False)).merge_and_unload()


def _trained_in_full(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.mul_(1.001)
    return model


@pytest.mark.parametrize("change", [_merged_in, _trained_in_full])
@pytest.mark.parametrize("shard", [False, True])
def test_a_base_that_is_in_no_file_is_refused(change: Any, shard: bool, tmp_path: Path) -> None:
    size = {"max_shard_size": "20KB"} if shard else {}
    tiny_model("llama").save_pretrained(tmp_path / "base", **size)
    model = change(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    with pytest.raises(ValueError, match=r"its weights \(model\.layers\.0\..* aren't those of"):
        attach_adapter(model, "auto")
    assert attach_adapter(model.requires_grad_(True), None) is model
    model.save_pretrained(tmp_path / "changed")
    attach_adapter(AutoModelForCausalLM.from_pretrained(tmp_path / "changed"), "auto")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_base_in_another_precision_is_the_same(dtype: torch.dtype, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "base")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
    attach_adapter(loaded, "auto")
    attach_adapter(loaded.float(), "new")


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_trained_tokens_of_a_tied_model_are_no_lora() -> None:
    config = peft.TrainableTokensConfig(
        token_indices=[3, 4], target_modules=["embed_tokens"], task_type="CAUSAL_LM"
    )
    assert _trained(attach_adapter(tiny_model("llama", tie_word_embeddings=True), config))


def test_an_attempt_that_fails_leaves_the_base_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    real = peft.LoraModel.inject_adapter

    def cut_short(self: Any, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(peft.LoraModel, "inject_adapter", cut_short)
    with pytest.raises(KeyboardInterrupt):
        attach_adapter(model, _lora(init_lora_weights="pissa"))
    for name, weight in model.named_parameters():
        if "lora_" not in name:
            assert torch.equal(weight, before[name.replace(".base_layer", "")])
