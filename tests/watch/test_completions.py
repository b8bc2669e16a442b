from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rmipo_lite import demo
from rmipo_lite.model.generation import Generated
from rmipo_lite.tokens.pair import TokenizedPair
from rmipo_lite.watch import completions
from rmipo_lite.watch.completions import (
    CLIPPED,
    MEAN_LENGTH,
    REPETITION,
    REPETITIVE,
    completion_numbers,
)


@pytest.fixture(scope="module")
def demo_model() -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(demo.MODEL), AutoTokenizer.from_pretrained(
        demo.MODEL
    )


def _pair(tokenizer: Any, prompt: str, chosen: int = 8) -> TokenizedPair:
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
    )
    return TokenizedPair(0, list(ids), [5] * chosen, [6, 7])


def test_phrases_that_stood_before() -> None:
    assert completions.repeated_share([1, 2, 3]) == 0  # no phrase of four
    assert completions.repeated_share([1, 2, 3, 4, 5, 6]) == 0
    # 1212, 2121, 1212, 2121, 1212: five phrases, two of them new
    assert completions.repeated_share([1, 2] * 4) == pytest.approx(3 / 5)


def test_numbers_by_hand(monkeypatch: pytest.MonkeyPatch, demo_model: tuple[Any, Any]) -> None:
    """Two answers: 3 tokens and an end; 8 without one, of whose 5 phrases 3 stood before."""
    answers = [Generated([7, 8, 9, 2], True), Generated([1, 2] * 4, False)]
    monkeypatch.setattr(completions, "generate_ids", lambda *args, **options: answers)
    model, tokenizer = demo_model
    numbers = completion_numbers(model, tokenizer, [_pair(tokenizer, "What?")], 8, seed=0)
    assert numbers == {
        MEAN_LENGTH: [3, 8], CLIPPED: [0, 1], REPETITION: [0, 3 / 5], REPETITIVE: [0, 1],
    }  # fmt: skip


def test_a_sentence_six_times_is_repetitive() -> None:
    sentence = [11, 12, 13, 14, 15, 16, 17, 18, 19, 20]
    assert completions.repeated_share(sentence * 6) > 0.8
    assert completions.repeated_share(sentence * 2) < 0.5 < completions.repeated_share(sentence * 3)
    assert completions.repeated_share([*sentence, *range(40, 60)]) == 0


def test_a_healthy_model_ends_and_the_run_sees_nothing(demo_model: tuple[Any, Any]) -> None:
    model, tokenizer = demo_model
    model.train()
    pairs = [_pair(tokenizer, f"What is 2 + {i}?") for i in range(6)]
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = completion_numbers(model, tokenizer, pairs, 4, seed=1)
    assert torch.equal(torch.rand(2), expected)
    assert model.training
    assert completion_numbers(model, tokenizer, pairs, 4, seed=1) == first
    assert first[CLIPPED] == [0] * 4
    assert all(1 < length < 64 for length in first[MEAN_LENGTH])


def test_which_prompts_are_answered(
    monkeypatch: pytest.MonkeyPatch, demo_model: tuple[Any, Any]
) -> None:
    """The first distinct ones that leave room for an answer of twice the median chosen length."""
    model, tokenizer = demo_model
    context = model.config.max_position_embeddings
    asked: list[Any] = []

    def generate(
        model: Any, tokenizer: Any, prompts: list[list[int]], limit: int, **options: Any
    ) -> list[Generated]:
        asked[:] = prompts, limit
        return [Generated([1], False) for _ in prompts]

    monkeypatch.setattr(completions, "generate_ids", generate)
    lengths = (3, 3, context - 80, context - 79, 0, 5, 6)
    pairs = [TokenizedPair(i, [9] * n, [5] * 40, [6]) for i, n in enumerate(lengths)]
    completion_numbers(model, tokenizer, pairs, 3, seed=0)
    assert [len(prompt) for prompt in asked[0]] == [3, context - 80, 5]
    assert asked[1] == 80
    for chosen, limit in ((1, 64), (500, 128)):
        completion_numbers(model, tokenizer, [TokenizedPair(0, [9], [5] * chosen, [6])], 3, 0)
        assert asked[1] == limit
    no_room = [TokenizedPair(0, [9] * context, [5], [6]), TokenizedPair(1, [], [5, 5], [6, 6])]
    asked.clear()
    for pairs in itertools.permutations(no_room):
        assert completion_numbers(model, tokenizer, pairs, 3, seed=0) == {}
    assert asked == []
