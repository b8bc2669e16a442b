"""Exported files in a real llama.cpp: they are the model, of every family and format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from rmipo_lite.demo import MODEL
from rmipo_lite.export import adapter_file, run as exporting
from rmipo_lite.export.check import check
from rmipo_lite.export.gguf_file import write_model
from rmipo_lite.export.llama_cpp import drift, loaded
from rmipo_lite.export.run import export
from rmipo_lite.model.generation import generate_answers
from tests.conftest import SHARED

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

_TINY: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": None,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
_ROPE = {"rope_theta": 10000.0, "original_max_position_embeddings": 64}
_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 32}
_KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (tf.LlamaConfig, {"tie_word_embeddings": False}),
    "llama with biases": (tf.LlamaConfig, {"attention_bias": True, "head_dim": 32}),
    "llama, slow frequencies stretched": (
        tf.LlamaConfig,
        {"rope_parameters": {**_ROPE, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                             "high_freq_factor": 4.0}},
    ),
    "mistral": (tf.MistralConfig, {"sliding_window": None}),
    "qwen2": (tf.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2, yarn": (
        tf.Qwen2Config, {"rope_parameters": {**_ROPE, "rope_type": "yarn", "factor": 8.0}},
    ),
    "qwen3": (tf.Qwen3Config, {"head_dim": 32}),
    "gemma2": (tf.Gemma2Config, _GEMMA),
    "gemma3": (tf.Gemma3TextConfig, _GEMMA),
    "phi3": (tf.Phi3Config, {}),
    "granite": (
        tf.GraniteConfig,
        {"attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.5,
         "logits_scaling": 2.0},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


def _demo() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)


def _random(kind: str, size: int) -> Any:
    config_of, options = _KINDS[kind]
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config_of(vocab_size=size, **_TINY, **options))
    with torch.no_grad():
        for weight in model.parameters():  # sharp enough for a wrong place to show
            weight.normal_(0, 0.25) if weight.ndim > 1 else weight.add_(0.1)
    return model.float()


def _texts(size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(10, size, (60,), generator=generator).tolist() for _ in range(2)]


@pytest.mark.parametrize("kind", _KINDS)
def test_every_family_predicts_what_the_model_does(
    kind: str, tokenizer: Any, tmp_path: Path
) -> None:
    model = _random(kind, len(tokenizer))
    written = write_model(model, tokenizer, tmp_path / "tiny.gguf", "f32", "tiny")
    assert written.fallen_back == {}
    with loaded(written.path, context=256) as file:
        found = drift(model, file, _texts(len(tokenizer)))
    assert found.kl < 5e-5
    assert found.same_first >= 0.97


def test_weights_at_another_place_are_found(tokenizer: Any, tmp_path: Path) -> None:
    """What the check must not let through: rotated halves as transformers has them."""
    model = _random("llama", len(tokenizer))
    other = _random("llama", len(tokenizer))
    weight = other.model.layers[1].self_attn.k_proj.weight
    with torch.no_grad():
        weight.copy_(weight.roll(1, 0))
    write_model(other, tokenizer, tmp_path / "other.gguf", "f32", "tiny")
    with pytest.raises(ValueError, match="makes something else of the file than the model is"):
        check(model, tokenizer, tmp_path / "other.gguf", "f32", _texts(len(tokenizer)))


@pytest.mark.parametrize(
    ("kind", "kl"), [("f16", 1e-4), ("bf16", 1e-3), ("q8_0", 1e-3), ("q4_k_m", 0.02)]
)
def test_the_demo_in_every_format(
    kind: str, kl: float, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = _demo()
    ids = [tokenizer(text)["input_ids"] for text in ("What is 2 + 6?", "The sum is eight. And 3?")]
    path = export(model, tokenizer, tmp_path / "new" / "demo.gguf", kind, ids)
    assert [file.name for file in path.parent.iterdir()] == ["demo.gguf"]
    said = capsys.readouterr().out
    assert "Checked: KL" in said
    with loaded(path) as file:
        assert drift(model, file, ids).kl < kl
        text, ended = file.answer([{"role": "user", "content": "What is 2 + 6?"}], 64)
    (answer,) = generate_answers(model, tokenizer, ["What is 2 + 6?"], conversational=True)
    assert ended
    assert text == answer or kind == "q4_k_m"


def test_an_adapter_alone_does_upon_the_base_what_it_did(
    tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", use_rslora=True)
    model = get_peft_model(_demo(), config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.05)
    ids = [tokenizer("What is 2 + 6? The sum is eight.")["input_ids"]]
    path = export(model, tokenizer, tmp_path / "lora.gguf", "f16", ids, adapter_only=True)
    assert "Checked upon its base model: KL" in capsys.readouterr().out
    whole = export(model, tokenizer, tmp_path / "whole.gguf", "f32", ids)
    assert "Checked: KL" in capsys.readouterr().out
    write_model(_demo(), tokenizer, tmp_path / "base.gguf", "f32", "base")
    with loaded(tmp_path / "base.gguf", adapter=path) as both, loaded(whole) as merged:
        ours, theirs = both.likeliest(ids[0]), merged.likeliest(ids[0])
    assert max(abs(ours[token] - theirs[token]) for token in ours.keys() & theirs.keys()) < 0.05
    with pytest.raises(ValueError, match="makes something else"):  # the base isn't the model
        check(model, tokenizer, tmp_path / "base.gguf", "f32", ids)


@pytest.mark.filterwarnings("ignore:.lora_bias=True", "ignore:Model has .tie_word")
@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"use_dora": True}, "can't say DoRA"),
        ({"lora_bias": True}, "an adapter with biases"),
        ({"modules_to_save": ["lm_head"]}, "trains whole layers"),
    ],
)
def test_more_than_lora_is_no_adapter_file(
    options: dict[str, Any], wanted: str, tokenizer: Any, tmp_path: Path
) -> None:
    model = get_peft_model(_demo(), LoraConfig(r=2, target_modules=["q_proj"], **options))
    with pytest.raises(ValueError, match=wanted):
        export(model, tokenizer, tmp_path / "lora.gguf", "f16", [[1, 2, 3]], adapter_only=True)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_said_and_leaves_nothing(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model.gguf"
    gpt2 = AutoModelForCausalLM.from_config(
        tf.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=len(tokenizer))
    )
    with pytest.raises(ValueError, match="gpt2 can't be exported to GGUF here; known are llama"):
        export(gpt2, tokenizer, target, "f16", [[1, 2]])
    with pytest.raises(ValueError, match=r"format must be one of f32, .*got 'q5'"):
        export(_demo(), tokenizer, target, "q5", [[1, 2]])
    with pytest.raises(ValueError, match="adapter_only: this model has no adapter"):
        export(_demo(), tokenizer, target, "f16", [[1, 2]], adapter_only=True)
    large = _random("llama", len(tokenizer))
    with torch.no_grad():
        large.model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    with pytest.raises(ValueError, match="numbers up to 1e\\+05, and float16 ends at 65,504"):
        export(large, tokenizer, target, "f16", [[1, 2]])
    # A file that llama.cpp makes something else of isn't left behind.
    monkeypatch.setattr(exporting, "_whole", lambda model: _random("llama", len(tokenizer)))
    with pytest.raises(ValueError, match="makes something else of the file"):
        export(_demo(), tokenizer, target, "f32", [list(range(20, 40))])
    assert not list(tmp_path.iterdir())
    target.write_text("kept")
    with pytest.raises(FileExistsError, match="name a new file"):
        export(_demo(), tokenizer, target, "f16", [[1, 2]])
    assert target.read_text() == "kept"


def _adapted(strength: float, **options: Any) -> Any:
    given = {"r": 4, "target_modules": ["q_proj", "v_proj"], **options}
    model = get_peft_model(_demo(), LoraConfig(**given))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, strength)
    return model


@pytest.mark.parametrize("adapter_only", [False, True])
def test_a_file_without_what_was_trained_is_found(
    adapter_only: bool, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most training moves a model by less than any fixed limit that rounding needs."""
    model = _adapted(0.01)
    ids = [tokenizer("What is 2 + 6? The sum is eight.")["input_ids"]]
    target = tmp_path / "file.gguf"
    export(model, tokenizer, target, "f32", ids, adapter_only=adapter_only)
    target.unlink()
    monkeypatch.setattr(exporting, "_whole", lambda model: _demo())
    real = adapter_file._entry
    monkeypatch.setattr(adapter_file, "_entry", lambda name, weight: real(name, 0 * weight))
    with pytest.raises(ValueError, match="what was trained isn't in it"):
        export(model, tokenizer, target, "f32", ids, adapter_only=adapter_only)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:Model has .tie_word")
def test_adapters_that_a_file_cannot_say_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    def refused(model: Any, wanted: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=wanted):
            export(
                model, tokenizer, tmp_path / "x.gguf", "f16", [[1, 2, 3]], adapter_only=True,
                **options,
            )  # fmt: skip

    several = _adapted(0.01)
    several.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    several.base_model.set_adapter(["default", "other"])
    refused(several, "several adapters at once")
    merged = _adapted(0.01)
    merged.merge_adapter()
    refused(merged, "merged into its base already")
    refused(_adapted(0.01, target_modules=["lm_head", "q_proj"]), "a head that is the embeddings")
    refused(_adapted(0.01), "would have to name a file of its base", modelfile=True)
    assert not list(tmp_path.iterdir())


def test_prompts_of_any_length_are_compared_on(
    tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, ids in enumerate(([1], list(range(20, 60)) * 20)):  # of a context of 256
        export(_demo(), tokenizer, tmp_path / f"{number}.gguf", "f16", [ids])
    assert capsys.readouterr().out.count("Checked: KL") == 2


def test_templates_by_name(tokenizer: Any, tmp_path: Path) -> None:
    several = AutoTokenizer.from_pretrained(MODEL)
    several.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ messages }}"}
    path = export(_demo(), several, tmp_path / "x.gguf", "f16", [[20, 30, 40]], check=False)
    with loaded(path) as file:
        user = [{"role": "user", "content": "hi"}]
        wanted = tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True)
        assert file.rendered(user) == wanted


@pytest.mark.slow
def test_a_model_of_sentence_pieces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = SHARED / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer("Once upon a time there was a little girl named Lily.")["input_ids"]]
    export(model, tokenizer, tmp_path / "stories.gguf", "f16", ids)
    assert "Checked: KL" in capsys.readouterr().out
