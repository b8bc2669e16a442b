"""`rmipo-lite chat RUN`: a conversation in a terminal, and with one key what it was before."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from transformers import TextStreamer

from rmipo_lite.output.console import Lenient, in_terminal, printable, say
from rmipo_lite.results.conversation import Conversation
from rmipo_lite.system.processes import edit_typed_lines

HELP = (
    "Enter alone: what the model said to this before training. /new: begin again. "
    "/quit or the end of input: leave. Ctrl-C stops an answer."
)


class Words(TextStreamer):
    """Writes an answer word by word, without what a terminal would execute."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """A piece that won't change any more."""
        out = Lenient(sys.stdout)
        out.write(printable(text) + ("\n" if stream_end else ""))
        sys.stdout.flush()


def talk(run: Any, system: str | None, options: dict[str, Any]) -> None:
    """Answer line by line until the input ends.

    Args:
        run: as `load_run` gives it.
        system: the first message, if any.
        options: of every answer: max_new_tokens, and those of `model.generate`.

    Raises:
        ValueError: the tokenizer has no chat template.
    """
    conversation = Conversation(run.model, run.tokenizer, system)
    say(HELP)
    for line in _lines():
        if line == "/quit":
            return
        if line == "/new":
            conversation = Conversation(run.model, run.tokenizer, system)
            say("(a new conversation)")
        elif line.startswith("/"):
            say(HELP)
        else:
            _answer(conversation, run, line, options)


def _answer(conversation: Conversation, run: Any, line: str, options: dict[str, Any]) -> None:
    streamed = {**options, "streamer": Words(run.tokenizer, skip_prompt=True,
                                             skip_special_tokens=True)}  # fmt: skip
    try:
        if line:
            answer = conversation.say(line, **streamed)
        else:
            say("(before training)")
            answer = conversation.again(weights=run.at_start, **streamed)
    except KeyboardInterrupt:
        say("\n(stopped; this turn is forgotten)" if line else "\n(stopped)")
    except (TypeError, ValueError) as error:
        say(f"({error})")
    else:
        if not answer.ended:
            say("(cut at its longest)")


def _lines() -> Iterator[str]:
    """What is typed, without spaces around it; a line's history where the system has one."""
    watched = in_terminal() and sys.stdin.isatty()
    if watched:
        edit_typed_lines()
    while True:
        try:
            yield input("> " if watched else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            say("")
            return
