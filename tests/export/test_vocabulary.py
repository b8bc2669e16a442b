"""Tokenizers by what they say of themselves: known ways of cutting texts, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rmipo_lite.export.vocabulary import vocabulary_of

pytest.importorskip("gguf")

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _fast(
    *cuts: Any, normalizer: Any = None, byte_fallback: bool = False, tokens: int = 0
) -> PreTrainedTokenizerFast:
    letters = pre_tokenizers.ByteLevel.alphabet()
    words = ["<s>", "</s>", *sorted(letters), "th", "the", *(f"w{n}" for n in range(tokens))]
    model = models.BPE(
        {word: number for number, word in enumerate(words)}, [("t", "h"), ("th", "e")],
        byte_fallback=byte_fallback,
    )  # fmt: skip
    backend = Tokenizer(model)
    if cuts:
        backend.pre_tokenizer = cuts[0] if len(cuts) == 1 else pre_tokenizers.Sequence(list(cuts))
    if normalizer is not None:
        backend.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def _split(numbers: str) -> Any:
    return pre_tokenizers.Split(Regex(_SPLIT % numbers), behavior="isolated")


_PLAIN = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
_CUTTING = pre_tokenizers.ByteLevel(add_prefix_space=False)


@pytest.mark.parametrize(
    ("cuts", "name"),
    [
        ((_CUTTING,), "gpt-2"),
        ((pre_tokenizers.Digits(individual_digits=True), _CUTTING), "refact"),
        ((_split("{1,3}"), _PLAIN), "llama-bpe"),
        ((_split(""), _PLAIN), "qwen2"),
    ],
)
def test_ways_of_cutting_have_names(cuts: tuple[Any, ...], name: str) -> None:
    found = vocabulary_of(_fast(*cuts), 300)
    assert (found.model, found.pre) == ("gpt2", name)
    assert found.merges == ["t h", "th e"]
    assert len(found.tokens) == len(found.kinds) == 300
    assert found.tokens[-1] == "[PAD299]"


@pytest.mark.parametrize(
    ("tokenizer", "wanted"),
    [
        (_fast(_split("{1,2}"), _PLAIN), "no known name for the way it cuts texts"),
        (_fast(pre_tokenizers.Whitespace()), "no known name"),
        (_fast(_CUTTING, normalizer=normalizers.Lowercase()), "its normalizer .*Lowercase"),
        (_fast(_CUTTING, tokens=100), "has token 3.*embeddings end at 299"),
    ],
)
def test_others_are_refused(tokenizer: Any, wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        vocabulary_of(tokenizer, 300)


def test_pieces_are_merged_in_the_order_of_the_merges() -> None:
    fast = _fast(normalizer=normalizers.Replace(" ", "▁"), byte_fallback=True)
    found = vocabulary_of(fast, 300)
    assert found.model == "llama"
    assert found.scores is not None
    scores = dict(zip(found.tokens, found.scores, strict=True))
    assert scores["th"] > scores["the"] > scores["a"]
    assert found.special["add_add_space_prefix"] is False
    front = _fast(normalizer=normalizers.Prepend("▁"), byte_fallback=True)
    assert vocabulary_of(front, 300).special["add_add_space_prefix"] is True


def test_the_end_is_the_one_that_training_scored() -> None:
    fast = _fast(_CUTTING)
    fast.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    fast.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    found = vocabulary_of(fast, 300)
    assert found.special["add_eos_token_id"] == fast.convert_tokens_to_ids("<|end|>")
    assert found.special["add_eot_token_id"] == found.special["add_eos_token_id"]
