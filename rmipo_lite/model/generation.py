"""Answers of a model to a list of prompts, and the comparison of two lists of answers.

Batched generation needs left padding and a pad token. Both are arranged for the call alone: ids
are padded here, by hand, and a missing pad token is stood in for by the end token, so the user's
tokenizer keeps its settings and the vocabulary its size.
"""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig

from rmipo_lite.adapters.base_model import causal_lm
from rmipo_lite.adapters.embeddings import plain_embedding
from rmipo_lite.model.backbone import evaluating
from rmipo_lite.output.console import say
from rmipo_lite.tokens.ending import end_id
from rmipo_lite.tokens.tokenize_rows import encode_prompt

Prompt = str | list[dict[str, str]]
BATCH = 16  # prompts generated together


def prompts_of(given: Any) -> list[Prompt]:
    """A list of prompts, copied: texts, message lists, or rows with a `prompt`.

    Raises:
        TypeError: one prompt, or a table of them, in place of a list; or something else in it.
        ValueError: a text that is no valid Unicode.
    """
    if isinstance(given, str | Path):
        raise TypeError("prompts must be a list of prompts, got one string; write [prompt]")
    if isinstance(given, Mapping) or hasattr(given, "columns"):
        raise TypeError(
            f"prompts must be a list of prompts, got a table ({type(given).__name__}); write "
            'list(table["prompt"])'
        )
    listed = list(given)
    if listed and all(isinstance(one, Mapping) and "role" in one for one in listed):
        raise TypeError("prompts must be a list of prompts, got one conversation; write [prompt]")
    return [_prompt_of(one, place) for place, one in enumerate(listed)]


def _prompt_of(given: Any, place: int) -> Prompt:
    found = given.get("prompt") if isinstance(given, Mapping) else given
    if isinstance(found, str):
        return whole_text(found, f"prompts: number {place}")
    messages = list(found) if isinstance(found, list | tuple) else []
    if not messages or not all(isinstance(m, Mapping) and "role" in m for m in messages):
        raise TypeError(
            f"prompts: number {place} is neither a text nor a list of messages: {given!r:.80}"
        )
    return [dict(message) for message in messages]


def whole_text(text: str, what: str) -> str:
    """The text. Raises ValueError for half a character, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} is no valid Unicode: {error.reason}") from error
    return text


def prompt_text(prompt: Prompt) -> str:
    """A prompt as one text for people."""
    if isinstance(prompt, str):
        return prompt
    if [message.get("role") for message in prompt] == ["user"]:
        return prompt[0].get("content", "")
    return "\n".join(f"{m.get('role', '?')}: {m.get('content', '')}" for m in prompt)


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


def stop_ids(config: GenerationConfig, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the one that training scores, and the model's own."""
    own = config.eos_token_id
    ids = [end_id(tokenizer), *(own if isinstance(own, list) else [own]), tokenizer.eos_token_id]
    return [i for i in dict.fromkeys(ids) if i is not None]


def other_ends(
    config: GenerationConfig | None, tokenizer: Any, scored: int | None
) -> tuple[str, str] | None:
    """(the end that training scores, those that the model stops at by itself), if they differ."""
    own = None if config is None else config.eos_token_id
    known = own if isinstance(own, list) else [own]
    if scored is None or scored in known:
        return None
    texts = [tokenizer.convert_ids_to_tokens(i) for i in known if i is not None]
    return str(tokenizer.convert_ids_to_tokens(scored)), ", ".join(map(str, texts)) or "none"


def vocabulary_size(model: Any) -> int:
    """How many tokens the model has an embedding for."""
    return int(plain_embedding(causal_lm(model)).weight.shape[0])


def _generation_config(model: Any) -> GenerationConfig:
    """A copy of the model's; of a model without one, what its config says."""
    base = causal_lm(model)
    return copy.deepcopy(base.generation_config) or GenerationConfig.from_model_config(base.config)


def savable_generation_config(model: Any, tokenizer: Any) -> GenerationConfig:
    """The model's generation config, stopping where answers end, in a form that can be saved.

    Settings for which transformers refuses to save it (a temperature where nothing is sampled, a
    negative pad token) are left out, and one line says so.

    Raises:
        ValueError: it says something that can't be.
    """
    config = _generation_config(model)
    ids = stop_ids(config, tokenizer)
    config.eos_token_id = ids if len(ids) > 1 else next(iter(ids), None)
    try:
        config.validate(strict=True)
    except ValueError as error:
        idle = re.findall(r"^- `(\w+)`", str(error), re.MULTILINE)
        left_out = {name: getattr(config, name) for name in idle}
        for name in idle:
            setattr(config, name, None)
        with _named("generation_config"):
            config.validate(strict=True)
        shown = ", ".join(f"{name}={value!r}" for name, value in left_out.items())
        say(f"generation_config: {shown} left out of what is saved: transformers refuses it there")
    return config


@contextmanager
def _named(what: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


class Answer(str):
    """A generated text; `ended` is False where the limit of tokens cut it short."""

    ended: bool = True


@contextmanager
def _ready_to_generate(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Evaluation mode with the key-value cache on; everything as before afterwards."""
    base = causal_lm(model)
    own = base.generation_config
    base.generation_config = own or config  # generate() reads it beside the one it is given
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
        base.generation_config = own


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
    prompts = prompts_of(prompts)
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
    """Ids that follow each prompt of ids (none empty); options as for `generate_answers`.

    Raises ValueError for a token outside the vocabulary, and for options that give more than texts.
    """
    _refuse_other_tokens(prompts, vocabulary_size(model))
    one_text = {"num_return_sequences": 1, "return_dict_in_generate": False}
    for name, only in one_text.items():
        if options.get(name) not in (None, only):
            raise ValueError(f"{name} must be {only}, for one text a prompt, got {options[name]!r}")
    config = _generation_config(model)
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    config.update(pad_token_id=pad, max_new_tokens=max_new_tokens, max_length=None, **one_text)
    config.eos_token_id = stop_ids(config, tokenizer)
    # What the config knows goes there (transformers wants one place for both); the rest, such as a
    # streamer, goes to the call. stop_strings need the tokenizer.
    options = config.update(**{"do_sample": False, "tokenizer": tokenizer, **options})
    if not config.do_sample:  # a model's own sampling settings only draw warnings when greedy
        config.update(temperature=None, top_p=None, top_k=None)
    generated: list[Generated] = []
    device = next(model.parameters()).device
    with _ready_to_generate(model, config), torch.no_grad():
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
            generated += _up_to_the_end(out[:, width:], config, tokenizer)
    return generated


def _refuse_other_tokens(prompts: Sequence[list[int]], size: int) -> None:
    for place, row in enumerate(prompts):
        if max(row) >= size:
            raise ValueError(
                f"tokenizer: it gives token {max(row)} (prompt {place}), and the model's "
                f"vocabulary has {size}; use the model's own tokenizer"
            )


def _up_to_the_end(ids: torch.Tensor, config: GenerationConfig, tokenizer: Any) -> list[Generated]:
    """Each row without what stands after its first end token, or, of a stop string, the padding."""
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    stops = config.stop_strings or []
    stops = [stops] if isinstance(stops, str) else stops
    found = []
    for row in ids.tolist():
        end = next((place for place, token in enumerate(row) if token in ends), None)
        if end is not None:
            found.append(Generated(row[: end + 1], ended=True))
            continue
        stopped = bool(stops) and any(stop in tokenizer.decode(row) for stop in stops)
        while stopped and row[-1] == config.pad_token_id:
            row.pop()
        found.append(Generated(row, stopped))
    return found
