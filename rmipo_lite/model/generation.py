"""Answers of a model to a list of prompts, and the comparison of two lists of answers.

Batched generation needs left padding and a pad token. Both are arranged for the call alone: ids
are padded here, by hand, and a missing pad token is stood in for by the end token, so the user's
tokenizer keeps its settings and the vocabulary its size.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from rmipo_lite.model.backbone import evaluating
from rmipo_lite.tokens.tokenize_rows import encode_prompt

Prompt = str | list[dict[str, str]]
BATCH = 16  # prompts generated together


def prompt_ids(tokenizer: Any, prompt: Prompt, *, conversational: bool) -> list[int]:
    """Token ids a model would see before its answer.

    Messages, and strings when `conversational` and the tokenizer has a chat template, are rendered
    by the template with the generation prompt; other strings are taken as they are.
    """
    if isinstance(prompt, str) and conversational and tokenizer.chat_template:
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, str) and not tokenizer.chat_template:
        raise ValueError(
            "prompts: a message list needs a tokenizer with a chat template, and this one has "
            "none; pass the prompt as plain text"
        )
    # As in training: one BOS, and text that a template puts before the answer.
    return encode_prompt(prompt, tokenizer)


class Answer(str):
    """A generated text; `ended` is False where the limit of tokens cut it short."""

    ended: bool = True


@contextmanager
def _ready_to_generate(model: Any) -> Iterator[None]:
    """Evaluation mode with the key-value cache on; everything as before afterwards."""
    checkpointed = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    use_cache = model.config.use_cache
    model.config.use_cache = True
    for module in checkpointed:  # a checkpointed block has no cache to write to
        module.gradient_checkpointing = False
    try:
        with evaluating(model):
            yield
    finally:
        for module in checkpointed:
            module.gradient_checkpointing = True
        model.config.use_cache = use_cache


class Generated(NamedTuple):
    """Generated ids, the end token among them where there is one."""

    ids: list[int]
    ended: bool


def generate_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    conversational: bool = False,
    max_new_tokens: int = 128,
    **options: Any,
) -> list[Answer]:
    """One answer for each prompt, without the prompt and without special tokens.

    Greedy unless `do_sample=True` is among the options, which are those of `model.generate`.
    Raises TypeError for a single string in place of a list.
    """
    if isinstance(prompts, str):
        raise TypeError("prompts must be a list of prompts, got one string; write [prompt]")
    ids = [prompt_ids(tokenizer, p, conversational=conversational) for p in prompts]
    empty = [i for i, row in enumerate(ids) if not row]
    if empty:
        raise ValueError(f"prompts: prompt {empty[0]} has no token; an empty text has no answer")
    answers = []
    for generated in generate_ids(model, tokenizer, ids, max_new_tokens, **options):
        answer = Answer(tokenizer.decode(generated.ids, skip_special_tokens=True))
        answer.ended = generated.ended
        answers.append(answer)
    return answers


def generate_ids(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], max_new_tokens: int, **options: Any
) -> list[Generated]:
    """Ids that follow each prompt of ids (none empty); options as for `generate_answers`."""
    config = copy.deepcopy(model.generation_config)
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    config.update(pad_token_id=pad, max_new_tokens=max_new_tokens, max_length=None)
    if config.eos_token_id is None:
        config.eos_token_id = tokenizer.eos_token_id
    # What the config knows goes there (transformers wants one place for both); the rest, such as a
    # streamer, goes to the call.
    options = config.update(**{"do_sample": False, **options})
    if not config.do_sample:  # a model's own sampling settings only draw warnings when greedy
        config.update(temperature=None, top_p=None, top_k=None)
    generated: list[Generated] = []
    device = next(model.parameters()).device
    with _ready_to_generate(model), torch.no_grad():
        for start in range(0, len(prompts), BATCH):
            batch = prompts[start : start + BATCH]
            width = max(map(len, batch))
            rows = [[pad] * (width - len(row)) + row for row in batch]
            mask = [[0] * (width - len(row)) + [1] * len(row) for row in batch]
            out = model.generate(
                input_ids=torch.tensor(rows, device=device),
                attention_mask=torch.tensor(mask, device=device),
                generation_config=config,
                **options,
            )
            generated += _up_to_the_end(out[:, width:], config.eos_token_id)
    return generated


def _up_to_the_end(ids: torch.Tensor, eos_token_id: int | list[int]) -> list[Generated]:
    """Each row without what stands after its first end token."""
    ends = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id)
    found = []
    for row in ids.tolist():
        end = next((place for place, token in enumerate(row) if token in ends), None)
        found.append(Generated(row if end is None else row[: end + 1], end is not None))
    return found
