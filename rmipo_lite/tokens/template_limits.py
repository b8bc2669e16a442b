"""What a chat template may take while it renders: time, memory, and no powers.

Templates are programs from strangers. The sandbox they run in keeps them from Python's objects and
from `range` above 100,000, but not from loops in loops or from `'a' * 10**10`.
"""

import contextlib
import ctypes
import functools
import threading
import time
from collections.abc import Iterator

import jinja2

from rmipo_lite.system import memory

RENDER_SECONDS = 20.0  # for one batch of conversations
RENDER_BYTES = 4 * 2**30  # address space, beside what the process has when it begins
_LOOK_S = 0.02  # between two looks at clock and memory


class _TookTooLong(BaseException):
    """Not an Exception, so that no handler inside a template's functions swallows it."""


class _TookTooMuch(BaseException):
    """The same of memory."""


@functools.lru_cache(maxsize=16)
def refuse_powers(template: str) -> None:
    """Raise ValueError for a template that uses the operator `**`.

    `10 ** 10 ** 9` is one instruction: it runs for hours and no limit can interrupt it. Before a
    keyword argument (`f(**names)`) the two stars mean something else.
    """
    before = ""
    try:
        for line, kind, value in jinja2.Environment().lex(template):
            if kind == "operator" and value == "**" and before not in ("(", ","):
                raise ValueError(
                    f"chat_template: line {line} uses the operator **, which no template needs and "
                    "no time limit can interrupt; take it out"
                )
            before = before if kind == "whitespace" else value
    except jinja2.TemplateSyntaxError:
        return  # told when it is rendered


@contextlib.contextmanager
def render_limits() -> Iterator[None]:
    """Raise ValueError where the block takes more than RENDER_SECONDS or RENDER_BYTES.

    Where a process's memory can't be limited (Windows, macOS), one instruction may take more.
    """
    problem = "the template is broken or hostile"
    try:
        with memory.limit(RENDER_BYTES), _watched(RENDER_SECONDS, RENDER_BYTES):
            yield
    except _TookTooLong:
        raise ValueError(
            f"chat_template: rendering took more than {RENDER_SECONDS:g} s; {problem}"
        ) from None
    except (MemoryError, _TookTooMuch):
        raise ValueError(
            f"chat_template: rendering took more than {RENDER_BYTES / 2**30:.3g} GiB; {problem}"
        ) from None


@contextlib.contextmanager
def _watched(seconds: float, size: int) -> Iterator[None]:
    """Raise in this thread what it took too much of; between instructions, any thread or system."""
    thread, lock, done = threading.get_ident(), threading.Lock(), threading.Event()
    deadline, most = time.monotonic() + seconds, memory.held_bytes() + size

    def watch() -> None:
        kind: type[BaseException] | None = None
        while kind is None and not done.wait(_LOOK_S):
            if time.monotonic() > deadline:
                kind = _TookTooLong
            elif not memory.CAN_LIMIT and memory.held_bytes() > most:
                kind = _TookTooMuch
        with lock:
            if not done.is_set():
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(thread), ctypes.py_object(kind)
                )

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        with lock:
            done.set()
