"""Whether an exported file is the model: tokens, chat template and predictions, in llama.cpp.

A file that cuts texts otherwise, or has a weight at another's place, loads and answers: only worse.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from rmipo_lite.adapters.base_model import causal_lm
from rmipo_lite.export.llama_cpp import Drift, LlamaCpp, drift, loaded

# KL from the model, nats a token, that rounding to a format explains; a wrong weight gives more.
_MOST_KL = {"f32": 0.01, "f16": 0.01, "bf16": 0.02, "q8_0": 0.1, "q4_k_m": 2.0}
# Formats that round less than most training does, and the least of an effect that tells.
_EXACT, _TELLING = ("f32", "f16"), 5e-5
_TEXTS = Path(__file__).with_name("texts.json")  # in many scripts
_AROUND = ("{}", " {}", "{}\n", "A {} B", "{0}{0}")


def is_available() -> bool:
    """Whether llama.cpp is here to ask."""
    return find_spec("xllamacpp") is not None


def check(
    model: nn.Module,
    tokenizer: Any,
    path: Path,
    kind: str,
    prompts: Sequence[list[int]],
    adapter: Path | None = None,
) -> Drift:
    """How far the file is from the model.

    Args:
        model: what was exported.
        tokenizer: its own.
        path: the file; of an adapter's, that of the base model.
        kind: the format.
        prompts: ids of texts at whose places predictions are compared.
        adapter: the adapter's file.

    Raises:
        ValueError: the file is not the model; the message says in what.
    """
    prompts = _fitting(model, tokenizer, prompts)
    longest = max(map(len, prompts))
    with loaded(path, context=max(256, longest + 8), adapter=adapter) as file:
        _check_tokens(tokenizer, file)
        _check_template(tokenizer, file)
        found = drift(model, file, prompts)
    if found.kl > _MOST_KL[kind]:
        raise ValueError(
            f"llama.cpp makes something else of the file than the model is ({found}); please "
            "report the model's name"
        )
    is_telling = kind in _EXACT and (found.effect or 0.0) > _TELLING
    if is_telling and found.kl > 0.5 * (found.effect or 0.0):
        raise ValueError(
            f"the file is as far from the trained model as this is from its base ({found}): what "
            "was trained isn't in it"
        )
    return found


def _fitting(model: nn.Module, tokenizer: Any, prompts: Sequence[list[int]]) -> list[list[int]]:
    """Prompts cut to the context, and texts of our own where they have nothing to predict."""
    config = causal_lm(model).config.get_text_config()
    room = int(config.max_position_embeddings) - 8
    usable = [ids[:room] for ids in prompts if len(ids) > 1]
    if usable:
        return usable
    return [tokenizer(text)["input_ids"][:room] for text in _read_texts()[:2]]


def _read_texts() -> list[str]:
    texts: list[str] = json.loads(_TEXTS.read_text(encoding="utf-8"))
    return texts


def _check_tokens(tokenizer: Any, file: LlamaCpp) -> None:
    for text in (around.format(text) for text in _read_texts() for around in _AROUND):
        ours = tokenizer(text, add_special_tokens=False)["input_ids"]
        theirs = file.tokens(text)
        if theirs != ours:
            raise ValueError(
                f"tokenizer: llama.cpp cuts {text!r} into {theirs[:12]}, this tokenizer into "
                f"{ours[:12]}; the model would read other tokens there than it was trained on"
            )


def _check_template(tokenizer: Any, file: LlamaCpp) -> None:
    if not tokenizer.chat_template:
        return
    user, answer = {"role": "user", "content": "Hi  there"}, {"role": "assistant", "content": "Ho"}
    for messages in ([user], [user, answer, user]):
        ours = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        theirs = file.rendered(messages)
        if theirs != ours:
            raise ValueError(
                f"chat template: llama.cpp renders {theirs[:200]!r}, transformers {ours[:200]!r}; "
                "it would be asked there as it never was (check=False writes it all the same)"
            )
