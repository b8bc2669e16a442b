"""A conversation with a trained model: what was said is seen with every further turn."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from rmipo_lite.adapters.base_model import causal_lm
from rmipo_lite.model.generation import Answer, generate_answers, prompt_ids, whole_text
from rmipo_lite.tokens.options import context_of

_LEAST = 16  # tokens that an answer must have room for


class Conversation:
    """The turns so far, and the model that answers.

    Args:
        model, tokenizer: as a run left them.
        system: the first message; None: without one.

    Attributes:
        messages: the turns, a user's and the model's by turns.

    Raises:
        ValueError: the tokenizer has no chat template.
    """

    def __init__(self, model: Any, tokenizer: Any, system: str | None = None) -> None:
        if not tokenizer.chat_template:
            raise ValueError(
                "chat needs a tokenizer with a chat template, and this one has none; "
                "generate([text]) goes on from a text"
            )
        self.system = system
        self._model, self._tokenizer = model, tokenizer
        self.messages: list[dict[str, str]] = []
        if system is not None:
            self.messages.append({"role": "system", "content": system})

    def say(self, text: str, max_new_tokens: int, **options: Any) -> Answer:
        """The answer to a further turn. Both are kept once it is there, and neither otherwise."""
        turn = {"role": "user", "content": whole_text(text, "the turn")}
        answer = self._answer([*self.messages, turn], max_new_tokens, **options)
        self.messages += [turn, {"role": "assistant", "content": str(answer)}]
        return answer

    def again(
        self,
        max_new_tokens: int,
        weights: Callable[[], AbstractContextManager[Any]] = nullcontext,
        **options: Any,
    ) -> Answer:
        """Another answer to the last turn, with other weights in force; it isn't kept.

        Raises:
            ValueError: nothing was said yet.
        """
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise ValueError("nothing was said yet")
        with weights():
            return self._answer(self.messages[:-1], max_new_tokens, **options)

    def _answer(
        self, messages: list[dict[str, str]], max_new_tokens: int, **options: Any
    ) -> Answer:
        count = len(prompt_ids(self._tokenizer, messages, conversational=True))
        context = context_of(causal_lm(self._model).config)
        left = max_new_tokens if context is None else context - count
        if left < min(_LEAST, max_new_tokens):
            raise ValueError(
                f"this conversation is {count} tokens long and the model reads {context}; begin a "
                "new one"
            )
        (answer,) = generate_answers(
            self._model, self._tokenizer, [messages], conversational=True,
            max_new_tokens=min(left, max_new_tokens), **options,
        )  # fmt: skip
        return answer
