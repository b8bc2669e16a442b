"""What a run is refused for before a trainer is made."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import EarlyStoppingCallback

from rmipo_lite.training.refusals import refuse_other_callbacks, refuse_other_vocabulary
from tests.kit import VOCAB, random_pairs, tiny_model, word_tokenizer


@pytest.mark.parametrize("callbacks", [EarlyStoppingCallback(1), "x", ["x"], [int], {}])
def test_other_callbacks_are_refused(callbacks: Any) -> None:
    with pytest.raises(TypeError, match="callbacks: wanted a list of transformers callbacks, got"):
        refuse_other_callbacks(callbacks)


@pytest.mark.parametrize(
    "callbacks", [None, [], [EarlyStoppingCallback], (EarlyStoppingCallback(),)]
)
def test_callbacks_of_transformers_are_taken(callbacks: Any) -> None:
    refuse_other_callbacks(callbacks)


def test_padding_outside_the_vocabulary_is_told() -> None:
    model, tokenizer, pairs = tiny_model("llama"), word_tokenizer(), random_pairs(2)
    refuse_other_vocabulary(pairs, model, tokenizer)
    tokenizer.add_tokens([f"more{number}" for number in range(VOCAB - len(tokenizer))])
    tokenizer.add_special_tokens({"pad_token": "<P>"})
    refuse_other_vocabulary(pairs, model)
    with pytest.raises(ValueError, match=f"pad token '<P>' is token {VOCAB}, .* has {VOCAB}; call"):
        refuse_other_vocabulary(pairs, model, tokenizer)
