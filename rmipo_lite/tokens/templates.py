"""Message rows -> texts through the tokenizer's chat template, checked for what templates do.

A row is scored from the first character of its answer to the mark that ends the turn. To know
where these are, the prompt is rendered with the generation prompt, the conversation with the
answer, and the first must be a prefix of the second. What stands between the prompt and the
answer (Qwen3's empty <think> block) and after it is found by rendering a known word as the answer.
Templates are programs from strangers: rendering has its limits, and a template that raises or
does not keep the prefix costs the rows it does that to, with the template's own words.
"""

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from rmipo_lite.data.normalise import Dropped, Identical, Message, Refused, roles
from rmipo_lite.data.rows import Row
from rmipo_lite.tokens.encoder import leading_ids
from rmipo_lite.tokens.template_limits import refuse_powers, render_limits

BATCH_CONVERSATIONS = 64
SENTINEL = "RMIPOANSWER"  # a word no template treats in any special way
PLAIN = (
    "{% for message in messages %}{% if not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ message['role'] | capitalize + ': ' + message['content'] }}"
    "{% if loop.last and message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\nAssistant: ' }}{% endif %}"
)


_RESPONSES = "chosen and rejected"


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
        ValueError: it is no Jinja text ("{" is missing).
        TypeError: the tokenizer is none.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(
            "tokenizer: wanted a tokenizer, as AutoTokenizer.from_pretrained(name) gives it, got "
            f"{type(tokenizer).__name__}"
        )
    if chat_template is None or chat_template == tokenizer.chat_template:
        return tokenizer
    if chat_template == "plain":
        # The template writes BOS itself, so that generation through it sees what training saw.
        chat_template = ("{{ bos_token }}" if leading_ids(tokenizer) else "") + PLAIN
    elif not isinstance(chat_template, str) or "{" not in chat_template:
        raise ValueError(
            f"chat_template: wanted None, 'plain' or a Jinja text, got "
            f"{str(chat_template)[:80]!r}; of a file pass the text, Path(file).read_text()"
        )
    prepared = copy.copy(tokenizer)
    prepared.chat_template = chat_template
    return prepared


def require_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError, naming the way out, unless the tokenizer has a chat template."""
    if tokenizer.chat_template is None:
        raise ValueError(
            "chat_template: the rows are conversations, but the tokenizer has no template. Pass "
            'chat_template="plain" for "User: ...\\nAssistant: ", or a Jinja template.'
        )


def render_rows(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase
) -> list[Rendered | Refused | Dropped]:
    """Texts of every message row, or the reason why it has none; each distinct prompt once.

    Raises:
        ValueError: the template took more than its limits.
    """
    keys = [json.dumps(row.prompt) for row in rows]
    distinct = {key: row.prompt for key, row in zip(keys, rows, strict=True)}
    rendered = render(list(distinct.values()), tokenizer, generation_prompt=True)
    prompts = dict(zip(distinct, rendered, strict=True))
    conversations = [[*row.prompt, *side] for row in rows for side in (row.chosen, row.rejected)]
    full = render(conversations, tokenizer)
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
        text = text_of(render([prompt], tokenizer, generation_prompt=True)[0], "prompt", prompt)
        return text + _Framer(tokenizer).frame(prompt, text).before
    except Refused as problem:
        raise ValueError(f"{problem.reason} ({problem.example})") from problem


def after_answer(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template's text after an answer; empty without a template, or one that takes no user."""
    prompt = [{"role": "user", "content": "Hello"}]
    try:
        text = text_of(render([prompt], tokenizer, generation_prompt=True)[0], "prompt", prompt)
        return _Framer(tokenizer).frame(prompt, text).after
    except Refused:
        return ""


class _Framer:
    """Cuts rendered conversations at the borders of the answer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._common: _Frame | None = None  # of the first row; nearly always that of all rows

    def frame(self, prompt: list[Message], prompt_text: str, lead: str = "") -> _Frame:
        """The template's text before and after an answer to this prompt that begins with `lead`."""
        conversation = [*prompt, {"role": "assistant", "content": lead + SENTINEL}]
        text = text_of(render([conversation], self._tokenizer)[0], _RESPONSES, conversation)
        before, found, after = _rest(text, prompt_text).partition(SENTINEL)
        if not found:
            raise Refused(
                _RESPONSES,
                "a chat template that writes the answer",
                "one that doesn't",
                _ends(text),
            )
        return _Frame(before, after)

    def _frame_of(self, prompt: list[Message], prompt_text: str, contents: list[str]) -> _Frame:
        try:
            return self.frame(prompt, prompt_text)
        except Refused:
            # Templates that open the thinking in the prompt keep the prefix for answers that think.
            thinking, end, _ = contents[0].partition("</think>")
            if not end:
                raise
            return _Frame("", self.frame(prompt, prompt_text, thinking + end).after)

    def cut(self, row: Row, prompt: Any, chosen: Any, rejected: Any) -> Rendered:
        """The texts of one row. Raises Refused or Dropped."""
        assert not isinstance(row.prompt, str)
        assert not isinstance(row.chosen, str)
        assert not isinstance(row.rejected, str)
        prompt_text = text_of(prompt, "prompt", row.prompt)
        sides = {"chosen": (chosen, row.chosen), "rejected": (rejected, row.rejected)}
        rests = [
            _rest(text_of(text, name, [*row.prompt, *side]), prompt_text)
            for name, (text, side) in sides.items()
        ]
        contents = [row.chosen[0]["content"], row.rejected[0]["content"]]
        asked = row.prompt[-1]["content"].strip()
        header = prompt_text.rpartition(asked)[2] if asked else ""
        for name, content, rest in zip(sides, contents, rests, strict=True):
            _refuse_doubled_thinking(name, content, header + rest)
        if self._common is None:
            self._common = self._frame_of(row.prompt, prompt_text, contents)
        frame = self._common
        bodies = _bodies(rests, frame)
        if bodies is None or [b.strip() for b in bodies[1]] != [c.strip() for c in contents]:
            frame = self._frame_of(row.prompt, prompt_text, contents)
            bodies = _bodies(rests, frame)
        if bodies is None:
            wanted = "a chat template that ends both answers alike"
            raise Refused(_RESPONSES, wanted, "two endings", _ends(rests[0]))
        before, answers = bodies
        for name, answer in zip(sides, answers, strict=True):
            if not answer.strip():
                raise Dropped(name, "a response", "an empty one after the chat template")
        if answers[0] == answers[1] and row.label is None:
            raise Identical(" after the chat template")
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


def _refuse_doubled_thinking(name: str, answer: str, turn: str) -> None:
    """An empty thought of the template's and then the answer's own: no model writes that."""
    if "<think>" in answer and turn.count("<think>") > answer.count("<think>"):
        raise Refused(
            name,
            "a chat template that leaves an answer's own <think> the first",
            "an empty one before it",
            _ends(turn),
        )


def _rest(text: str, prompt: str) -> str:
    if not text.startswith(prompt):
        at = next(
            (i for i, (a, b) in enumerate(zip(text, prompt, strict=False)) if a != b), len(text)
        )
        raise Refused(
            "prompt",
            "a chat template that writes it the same before an answer",
            "another text",
            f"{prompt[max(0, at - 40) : at + 40]!r} against {text[max(0, at - 40) : at + 40]!r}",
        )
    return text[len(prompt) :]


def _ends(text: str) -> str:
    return repr(text if len(text) <= 120 else text[:60] + " ... " + text[-60:])


def text_of(rendered: str | Exception, columns: str, conversation: list[Message]) -> str:
    """A rendered conversation. Raises Refused, naming columns and roles, where it has no text."""
    if isinstance(rendered, Exception):
        raise Refused(
            columns,
            "a conversation that the chat template takes",
            "one it refuses",
            f"{roles(conversation)}: {type(rendered).__name__}: {rendered}",
        )
    return rendered


def render(
    conversations: Sequence[Any],
    tokenizer: PreTrainedTokenizerBase,
    generation_prompt: bool = False,
) -> list[str | Exception]:
    """Every conversation as text, or what the template raised for it.

    Raises:
        ValueError: the template took more than its limits, or is no Jinja.
    """
    named = tokenizer.chat_template  # several by name, the one, or none
    if named is None:
        return [LookupError("the tokenizer has no chat template")] * len(conversations)
    for template in named.values() if isinstance(named, dict) else [named]:
        refuse_powers(template)
    texts: list[str | Exception] = []
    for start in range(0, len(conversations), BATCH_CONVERSATIONS):
        batch = list(conversations[start : start + BATCH_CONVERSATIONS])
        with render_limits():
            texts += _rendered(batch, tokenizer, generation_prompt)
    return texts


def _rendered(
    batch: list[Any], tokenizer: PreTrainedTokenizerBase, generation_prompt: bool
) -> list[str | Exception]:
    try:
        return list(
            tokenizer.apply_chat_template(
                batch, tokenize=False, add_generation_prompt=generation_prompt
            )
        )
    except MemoryError:
        raise  # a limit
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(
            f"chat_template: line {error.lineno} is not Jinja: {error.message}"
        ) from error
    except Exception as error:  # a template raises what it likes
        if len(batch) == 1:
            return [error]
    return [
        text
        for conversation in batch
        for text in _rendered([conversation], tokenizer, generation_prompt)
    ]
