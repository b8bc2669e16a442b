"""Where answers end: one token, in training, generation and every config that is saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import rmipo_lite
from rmipo_lite.model.generation import generate_ids, other_ends, savable_generation_config
from rmipo_lite.model.loading import load_model
from rmipo_lite.tokens.ending import end_id, scored_end
from rmipo_lite.tokens.pair import TokenizedPair
from tests.kit import EOS_ID, VOCAB, byte_level, tiny_model, word_tokenizer

_TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} w7 {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def _tokenizer(template: str | None = None, special: bool = True) -> Any:
    """A tokenizer whose template ends turns with w7, a control token of its own."""
    tokenizer = word_tokenizer()
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": ["w7"]})
    tokenizer.chat_template = template
    return tokenizer


def test_the_end_is_the_templates_else_eos() -> None:
    turn = _tokenizer().convert_tokens_to_ids("w7")
    assert end_id(_tokenizer()) == EOS_ID
    assert end_id(_tokenizer(_TEMPLATE)) == turn
    assert end_id(_tokenizer(_TEMPLATE, special=False)) == EOS_ID  # no control token
    refusing = "{{ raise_exception('no user here') }}"
    assert end_id(_tokenizer(refusing)) == EOS_ID


def test_generation_stops_at_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_model("llama"), _tokenizer(_TEMPLATE)
    turn = end_id(tokenizer)
    asked: list[Any] = []

    def generate(**kwargs: Any) -> torch.Tensor:
        asked.append(kwargs["generation_config"].eos_token_id)
        return torch.cat([kwargs["input_ids"], torch.tensor([[9, turn, 9]])], dim=1)

    monkeypatch.setattr(model, "generate", generate)
    model.generation_config.eos_token_id = EOS_ID
    (answer,) = generate_ids(model, tokenizer, [[5, 6]], 3)
    assert asked == [[turn, EOS_ID]]
    assert answer == ([9, turn], True)


def test_settings_that_cannot_be_saved_are_left_out_and_said(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = tiny_model("llama")
    model.generation_config = GenerationConfig(eos_token_id=2, temperature=0.9, num_beams=1)
    model.generation_config.pad_token_id = -1
    config = savable_generation_config(model, _tokenizer(_TEMPLATE))
    config.save_pretrained(tmp_path)
    said = "pad_token_id=-1, temperature=0.9 left out of what is saved: transformers refuses it"
    assert said in capsys.readouterr().out
    assert model.generation_config.temperature == 0.9
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [end_id(_tokenizer(_TEMPLATE)), 2]
    assert "temperature" not in saved


def test_a_config_that_cannot_be_is_refused_before() -> None:
    model = tiny_model("llama")
    model.generation_config.num_return_sequences = 3
    with pytest.raises(ValueError, match=r"generation_config: .*num_return_sequences"):
        savable_generation_config(model, _tokenizer())


def test_the_model_and_what_is_saved_stop_where_it_was_taught(tmp_path: Path) -> None:
    """A base model that stops at EOS alone, and a template whose turns end otherwise."""
    model, tokenizer = tiny_model("llama"), _tokenizer(_TEMPLATE)
    model.save_pretrained(tmp_path / "base")
    model = type(model).from_pretrained(tmp_path / "base")
    model.generation_config.eos_token_id = EOS_ID
    rows = [
        {
            "prompt": [{"role": "user", "content": f"w{10 + i} w3"}],
            "chosen": [{"role": "assistant", "content": "w4 w5"}],
            "rejected": [{"role": "assistant", "content": "w6 w6 w6"}],
        }
        for i in range(12)
    ]
    result = rmipo_lite.train(
        model, rows, tokenizer=tokenizer, output_dir=tmp_path / "run", max_steps=1, use_cpu=True,
        per_device_train_batch_size=4,
    )  # fmt: skip
    both = [end_id(tokenizer), EOS_ID]
    finding = next(f for f in result.findings if f.name == "ends_differ")
    assert "answers end with w7 in training, and the model itself stops at </s>" in finding.text
    assert model.generation_config.eos_token_id == both
    result.merge(tmp_path / "merged")
    for folder in (result.output_dir, tmp_path / "merged"):
        saved = json.loads((folder / "generation_config.json").read_text())
        assert saved["eos_token_id"] == both
    again: Any = load_model(str(result.output_dir), result.args)
    assert again.get_base_model().generation_config.eos_token_id == both


def test_ends_that_agree_are_no_finding() -> None:
    tokenizer = _tokenizer(_TEMPLATE)
    assert other_ends(GenerationConfig(eos_token_id=[7, EOS_ID]), tokenizer, EOS_ID) is None
    assert other_ends(GenerationConfig(eos_token_id=7), tokenizer, None) is None
    assert other_ends(GenerationConfig(eos_token_id=None), tokenizer, 2) == ("</s>", "none")
    assert other_ends(None, tokenizer, EOS_ID) == ("</s>", "none")


def test_the_scored_end_is_the_one_of_most_answers() -> None:
    """Text rows end with EOS whatever the template; cut answers end with any token."""
    pairs = [TokenizedPair(row, [5], [6, end], [7]) for row, end in enumerate([EOS_ID, 9, EOS_ID])]
    assert scored_end(pairs) == EOS_ID
    assert scored_end(pairs[:2]) is None
    assert scored_end([]) is None


def test_a_model_without_a_generation_config_answers() -> None:
    model, tokenizer = tiny_model("llama"), _tokenizer()
    expected = generate_ids(model, tokenizer, [[5, 6]], 3)
    model.generation_config = None
    assert generate_ids(model, tokenizer, [[5, 6]], 3) == expected
    assert model.generation_config is None
    assert savable_generation_config(model, tokenizer).eos_token_id == EOS_ID


def test_one_text_a_prompt_whatever_the_models_config_says() -> None:
    model, tokenizer = tiny_model("llama"), _tokenizer()
    expected = generate_ids(model, tokenizer, [[5, 6], [7]], 3, num_beams=3)
    model.generation_config = GenerationConfig(
        num_beams=3, num_return_sequences=3, return_dict_in_generate=True, eos_token_id=EOS_ID
    )
    assert generate_ids(model, tokenizer, [[5, 6], [7]], 3) == expected
    for name, value in (("num_return_sequences", 3), ("return_dict_in_generate", True)):
        with pytest.raises(ValueError, match=f"{name} must be .* for one text a prompt, got"):
            generate_ids(model, tokenizer, [[5]], 3, **{name: value})


@pytest.mark.parametrize("where", ["config", "options"])
def test_a_stop_string_ends_an_answer(where: str) -> None:
    """In a batch the answer that stops first is padded until the others are done."""
    tokenizer = byte_level()
    model = tiny_model("llama", vocab_size=len(tokenizer))
    prompts = tokenizer(["once", "there"], add_special_tokens=False)["input_ids"]
    first, second = (answer.ids for answer in generate_ids(model, tokenizer, prompts, 6))
    stop = tokenizer.decode(first[:3])
    assert stop not in tokenizer.decode(second)
    options = {"stop_strings": [stop]}
    if where == "config":
        model.generation_config.stop_strings, options = [stop], {}
    stopped, other = generate_ids(model, tokenizer, prompts, 6, **options)
    assert stopped == (first[:3], True)
    assert other == (second, False)


def test_a_prompt_outside_the_vocabulary_is_told() -> None:
    with pytest.raises(ValueError, match=rf"token {VOCAB} \(prompt 1\), .* has {VOCAB}; use"):
        generate_ids(tiny_model("llama"), _tokenizer(), [[5], [VOCAB, 6]], 3)
