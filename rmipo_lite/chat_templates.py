"""Message rows -> texts through the tokenizer's chat template, checked for what templates do.

A row is scored from the first character of its answer to the mark that ends the turn. To know
where these are, the prompt is rendered with the generation prompt, the conversation with the
answer, and the first must be a prefix of the second. What stands between the prompt and the
answer (Qwen3's empty <think> block) and after it is found by rendering a known word as the answer.
Templates are programs from strangers: rendering has a time limit, and a template that raises or
does not keep the prefix costs the rows it does that to, with the template's own words.
"""

from __future__ import annotations

import copy
import ctypes
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from rmipo_lite.data import Row
from rmipo_lite.data_rows import Dropped, Message, Refused
from rmipo_lite.text_encoder import leading_ids

RENDER_SECONDS = 20.0  # for one batch of conversations
BATCH_CONVERSATIONS = 64
SENTINEL = "RMIPOANSWER"  # a word no template treats in any special way
PLAIN = (
    "{% for message in messages %}{% if not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ message['role'] | capitalize + ': ' + message['content'] }}"
    "{% if loop.last and message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\nAssistant: ' }}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Rendered:
    """The texts of one row: what is given, what is scored, and the template's text after it."""

    prompt: str
    chosen: str
    rejected: str
    after: str
    stripped: int = 0  # answers that lost outer whitespace
    rewritten: int = 0  # answers changed otherwise


@dataclass(frozen=True, slots=True)
class _Frame:
    before: str
    after: str


def prepare_tokenizer(
    tokenizer: PreTrainedTokenizerBase, chat_template: str | None
) -> PreTrainedTokenizerBase:
    """The tokenizer with the chosen chat template on it, so that it is saved with it.

    Args:
        tokenizer: left as it is; a copy carries the template.
        chat_template: None (the tokenizer's own), "plain" ("User: ...\\nAssistant: "), or Jinja.

    Raises:
        ValueError: the text is no Jinja template ("{" is missing).
    """
    if chat_template is None or chat_template == tokenizer.chat_template:
        return tokenizer
    if chat_template == "plain":
        # The template writes BOS itself, so that generation through it sees what training saw.
        chat_template = ("{{ bos_token }}" if leading_ids(tokenizer) else "") + PLAIN
    elif "{" not in chat_template:
        raise ValueError(
            f"chat_template: wanted None, 'plain' or a Jinja text, got {chat_template[:80]!r}"
        )
    prepared = copy.copy(tokenizer)
    prepared.chat_template = chat_template
    return prepared


def require_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError, naming the way out, unless the tokenizer has a chat template."""
    if tokenizer.chat_template is None:
        raise ValueError(
            "The rows are conversations, but the tokenizer has no chat template. Pass "
            'chat_template="plain" for "User: ...\\nAssistant: ", or a Jinja template.'
        )


def render_rows(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase
) -> list[Rendered | Refused | Dropped]:
    """Texts of every message row, or the reason why it has none; each distinct prompt once.

    Raises:
        ValueError: the template took longer than RENDER_SECONDS.
    """
    require_template(tokenizer)
    keys = [json.dumps(row.prompt) for row in rows]
    distinct = {key: row.prompt for key, row in zip(keys, rows, strict=True)}
    rendered = _render(list(distinct.values()), tokenizer, generation_prompt=True)
    prompts = dict(zip(distinct, rendered, strict=True))
    conversations = [[*row.prompt, *side] for row in rows for side in (row.chosen, row.rejected)]
    full = _render(conversations, tokenizer, generation_prompt=False)
    framer = _Framer(tokenizer)
    outcomes: list[Rendered | Refused | Dropped] = []
    for number, (row, key) in enumerate(zip(rows, keys, strict=True)):
        try:
            outcomes.append(framer.cut(row, prompts[key], full[2 * number], full[2 * number + 1]))
        except (Refused, Dropped) as problem:
            outcomes.append(problem)
    return outcomes


def render_prompt(prompt: list[Message], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text in front of the answer, exactly as in training; for generation.

    Raises:
        ValueError: no template, or the template can't render this prompt.
    """
    require_template(tokenizer)
    try:
        text = _text(_render([prompt], tokenizer, generation_prompt=True)[0], [prompt])
        return text + _Framer(tokenizer).frame(prompt, text).before
    except Refused as problem:
        raise ValueError(f"{problem.reason}: {problem.example}") from problem


class _Framer:
    """Cuts rendered conversations at the borders of the answer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._common: _Frame | None = None  # of the first row; nearly always that of all rows

    def frame(self, prompt: list[Message], prompt_text: str) -> _Frame:
        """The template's text before and after an answer to this prompt."""
        conversation = [*prompt, {"role": "assistant", "content": SENTINEL}]
        text = _text(
            _render([conversation], self._tokenizer, generation_prompt=False)[0], [conversation]
        )
        before, found, after = _rest(text, prompt_text).partition(SENTINEL)
        if not found:
            raise Refused("the chat template does not write the answer", _ends(text))
        return _Frame(before, after)

    def cut(self, row: Row, prompt: Any, chosen: Any, rejected: Any) -> Rendered:
        """The texts of one row. Raises Refused or Dropped."""
        assert not isinstance(row.prompt, str)
        prompt_text = _text(prompt, [row.prompt])
        sides = (row.chosen, row.rejected)
        rests = [
            _rest(_text(text, [[*row.prompt, *side]]), prompt_text)
            for text, side in zip((chosen, rejected), sides, strict=True)
        ]
        contents = [side[0]["content"] for side in sides if not isinstance(side, str)]
        if self._common is None:
            self._common = self.frame(row.prompt, prompt_text)
        frame = self._common
        bodies = _bodies(rests, frame)
        if bodies is None or [b.strip() for b in bodies[1]] != [c.strip() for c in contents]:
            frame = self.frame(row.prompt, prompt_text)
            bodies = _bodies(rests, frame)
        if bodies is None:
            raise Refused("the chat template ends the two answers differently", _ends(rests[0]))
        before, answers = bodies
        for name, answer in zip(("chosen", "rejected"), answers, strict=True):
            if not answer.strip():
                raise Dropped(f"empty {name} response after the chat template")
        if answers[0] == answers[1]:
            raise Dropped("chosen and rejected are identical after the chat template", True)
        pairs = list(zip(answers, contents, strict=True))
        return Rendered(
            prompt_text + before,
            answers[0],
            answers[1],
            after=frame.after,
            stripped=sum(a != c and a.strip() == c.strip() for a, c in pairs),
            rewritten=sum(a.strip() != c.strip() for a, c in pairs),
        )


def _bodies(rests: list[str], frame: _Frame) -> tuple[str, list[str]] | None:
    """(inserted text shared by both sides, the two answers); None if the endings don't fit.

    An answer with its own <think> block replaces the empty one that others get: then nothing is
    shared, and both blocks belong to the answers.
    """
    before = frame.before if all(rest.startswith(frame.before) for rest in rests) else ""
    if not all(rest[len(before) :].endswith(frame.after) for rest in rests):
        return None
    return before, [rest[len(before) : len(rest) - len(frame.after)] for rest in rests]


def _rest(text: str, prompt: str) -> str:
    if not text.startswith(prompt):
        at = next(
            (i for i, (a, b) in enumerate(zip(text, prompt, strict=False)) if a != b), len(text)
        )
        raise Refused(
            "the chat template writes the prompt differently when an answer follows",
            f"{prompt[max(0, at - 40) : at + 40]!r} against {text[max(0, at - 40) : at + 40]!r}",
        )
    return text[len(prompt) :]


def _ends(text: str) -> str:
    return repr(text if len(text) <= 120 else text[:60] + " ... " + text[-60:])


def _text(rendered: str | Exception, conversation: list[list[Message]]) -> str:
    if isinstance(rendered, Exception):
        roles = ", ".join(message["role"] for message in conversation[0][:8])
        raise Refused(
            "the chat template refuses the conversation",
            f"roles {roles}: {type(rendered).__name__}: {rendered}",
        )
    return rendered


def _render(
    conversations: Sequence[Any], tokenizer: PreTrainedTokenizerBase, generation_prompt: bool
) -> list[str | Exception]:
    """Every conversation as text, or what the template raised for it."""
    texts: list[str | Exception] = []
    for start in range(0, len(conversations), BATCH_CONVERSATIONS):
        batch = list(conversations[start : start + BATCH_CONVERSATIONS])
        try:
            with _time_limit(RENDER_SECONDS):
                texts += _apply(batch, tokenizer, generation_prompt)
        except _TookTooLong:
            raise ValueError(
                f"chat_template: rendering {len(batch)} conversations took more than "
                f"{RENDER_SECONDS:g} s; the template is broken or hostile"
            ) from None
        except Exception as error:  # a template raises what it likes
            if len(batch) == 1:
                texts.append(error)
            else:
                for conversation in batch:
                    texts += _render([conversation], tokenizer, generation_prompt)
    return texts


def _apply(
    batch: list[Any], tokenizer: PreTrainedTokenizerBase, generation_prompt: bool
) -> list[str]:
    return list(
        tokenizer.apply_chat_template(
            batch, tokenize=False, add_generation_prompt=generation_prompt
        )
    )


class _TookTooLong(BaseException):
    """Not an Exception, so that no handler inside a template's functions swallows it."""


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise _TookTooLong in this thread after `seconds`; Python code only, any thread or system."""
    thread, lock, done = threading.get_ident(), threading.Lock(), False

    def interrupt() -> None:
        with lock:
            if not done:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(thread), ctypes.py_object(_TookTooLong)
                )

    timer = threading.Timer(seconds, interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with lock:
            done = True
        timer.cancel()
