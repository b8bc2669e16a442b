"""What a chat template may take while it renders: time, memory, and no powers.

Templates are programs from strangers. The sandbox they run in keeps them from Python's objects and
from `range` above 100,000, but not from loops in loops or from `'a' * 10**10`.
"""

import contextlib
import ctypes
import functools
import threading
from collections.abc import Iterator

import jinja2

from rmipo_lite.system import memory

RENDER_SECONDS = 20.0  # for one batch of conversations
RENDER_BYTES = 4 * 2**30  # address space, beside what the process has when it begins


class _TookTooLong(BaseException):
    """Not an Exception, so that no handler inside a template's functions swallows it."""


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
    """Raise ValueError where the block takes more than RENDER_SECONDS or RENDER_BYTES."""
    problem = "the template is broken or hostile"
    try:
        with memory.limit(RENDER_BYTES), _time_limit(RENDER_SECONDS):
            yield
    except _TookTooLong:
        raise ValueError(
            f"chat_template: rendering took more than {RENDER_SECONDS:g} s; {problem}"
        ) from None
    except MemoryError:
        raise ValueError(
            f"chat_template: rendering took more than {RENDER_BYTES / 2**30:.3g} GiB; {problem}"
        ) from None


@contextlib.contextmanager
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
