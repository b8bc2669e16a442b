"""Ollama's Modelfile: the chat template in Ollama's own language, where it can be said exactly.

The tokenizer's template is asked what it puts around a turn of every role, and that is written as
an Ollama template; conversations are rendered by both rules, and where one differs nothing is
written. Ollama itself isn't asked: it is on no package index.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmipo_lite.tokens.ending import end_id

_MARKS = {"user": "\x01", "assistant": "\x02", "system": "\x03"}
Message = dict[str, str]


@dataclass(frozen=True)
class Turns:
    """What a chat template puts around every turn.

    Attributes:
        bos: in front of the whole.
        around: role -> (before, after); a template without a system turn has none for it.
        opening: what invites the answer.
    """

    bos: str
    around: dict[str, tuple[str, str]]
    opening: str

    def render(self, messages: list[Message]) -> str:
        """As Ollama would."""
        parts = [
            f"{self.around[m['role']][0]}{m['content']}{self.around[m['role']][1]}"
            for m in messages
        ]
        return "".join([self.bos, *parts, self.opening])


def turns_of(tokenizer: Any) -> Turns:
    """What the tokenizer's chat template puts around turns.

    Raises:
        ValueError: there is no template, or it does more than put texts around turns.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "tokenizer: a Modelfile says how turns are written, and it has no template"
        )

    def rendered(messages: list[Message], *, opened: bool = False) -> str:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=opened
        )
        return text

    user, assistant, system = ({"role": r, "content": mark} for r, mark in _MARKS.items())
    try:
        one, both = rendered([user]), rendered([user, assistant])
        opening = rendered([user], opened=True).removeprefix(one)
        bos = tokenizer.bos_token if one.startswith(tokenizer.bos_token or "\0") else ""
        around = {
            "user": _split(one.removeprefix(bos), "user"),
            "assistant": _split(both.removeprefix(one), "assistant"),
        }
        with_system = _system(rendered, system, user, bos, one)
    except Exception as error:  # of a template: it is a stranger's program
        raise ValueError(f"chat template: it can't be said in a Modelfile ({error})") from error
    if with_system is not None:
        around["system"] = with_system
    turns = Turns(bos, around, opening)
    for messages in _conversations("system" in around):
        theirs = rendered(messages, opened=True)
        if turns.render(messages) != theirs:
            raise ValueError(
                "chat template: it can't be said in a Modelfile, which puts the same texts around "
                f"every turn: {theirs[:160]!r} would come out as {turns.render(messages)[:160]!r}"
            )
    return turns


def _split(text: str, role: str) -> tuple[str, str]:
    before, mark, after = text.partition(_MARKS[role])
    if not mark:
        raise ValueError(f"a turn of {role} isn't in its text")
    return before, after


def _system(
    rendered: Any, system: Message, user: Message, bos: str, one: str
) -> tuple[str, str] | None:
    """Around a system turn; None where the template has none, or folds it into the user's."""
    try:
        text = rendered([system, user]).removeprefix(bos)
    except Exception:  # many templates refuse one
        return None
    first = one.removeprefix(bos)
    if not text.endswith(first):
        return None
    return _split(text.removesuffix(first), "system")


def _conversations(has_system: bool) -> list[list[Message]]:
    user, other = {"role": "user", "content": "hi  there\n"}, {"role": "user", "content": "b"}
    answer = {"role": "assistant", "content": "a"}
    found = [[user], [user, answer, other], [user, answer, other, answer, user]]
    system = {"role": "system", "content": "be short"}
    return [*found, [system, user, answer, other]] if has_system else found


def modelfile_of(tokenizer: Any, model_file: Path) -> str:
    """The text of a Modelfile for a GGUF file that lies beside it.

    Raises:
        ValueError: as `turns_of`, or its texts can't stand in one.
    """
    turns = turns_of(tokenizer)
    parts = "".join(
        f'{{{{ if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}{{{{ end }}}}'
        for role, (before, after) in turns.around.items()
    )
    if '"""' in parts + turns.opening or "{{" in "".join(map("".join, turns.around.values())):
        raise ValueError("chat template: its texts hold what Ollama's templates are made of")
    # A tokenizer that begins every text with BOS says so in the file, and Ollama puts it there.
    is_put = tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
    bos = "" if is_put else turns.bos
    stops = [tokenizer.convert_ids_to_tokens(end_id(tokenizer))]
    lines = [
        f"FROM ./{model_file.name}",
        f'TEMPLATE """{bos}{{{{ range .Messages }}}}{parts}{{{{ end }}}}{turns.opening}"""',
        *(f'PARAMETER stop "{stop}"' for stop in stops),
    ]
    return "\n".join(lines) + "\n"
