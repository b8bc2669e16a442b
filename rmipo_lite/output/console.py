"""The one way the package prints.

`say` never raises: a closed pipe, an ASCII terminal or a missing stdout must not end a run of
hours. It imports nothing heavy, so that `rmipo-lite --help` stays quick.
"""

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

from rmipo_lite.system.processes import can_rewrite_lines

# What a terminal would execute rather than show: C0 controls but tab and newline, DEL, C1, and
# the marks that reverse the reading direction.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """`text` with control characters and direction marks shown as escapes, safe for a terminal."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match.group()):02x}", text)


class Lenient:
    """A stream that shows `?` for what its encoding lacks, as cp1252 on Windows does."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        return int(self._stream.write(text.encode(encoding, "replace").decode(encoding)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def rank() -> int:
    """Which of several processes this is; the first speaks for all.

    Asked of what is loaded, since one that was forked by a notebook has no RANK around it, and a
    RANK without others may be some scheduler's.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return int(distributed.get_rank())
    return int(os.environ.get("RANK") or 0) if is_launched() else 0


def is_launched() -> bool:
    """Whether a launcher (torchrun, accelerate launch) began this process beside others."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE") or 1) > 1


def say(text: str, *, of_each: bool = False) -> None:
    """Print one message to standard output; never raises, never sends control characters.

    Of several processes the first prints. `of_each`: it is about this process alone, and others
    print it too, to standard error with their number.
    """
    stream, number = sys.stdout, rank()
    if number and of_each:
        stream, text = sys.stderr, f"process {number}: {text}"
    elif number:
        return
    if stream is None:
        return
    try:
        Lenient(stream).write(printable(text) + "\n")
        stream.flush()
    except (OSError, ValueError, LookupError):
        # a closed pipe, a closed file or an unknown encoding: the message is lost, the run is not
        return


def in_terminal() -> bool:
    """Whether standard output can show a bar that rewrites its own line."""
    stream = sys.stdout
    try:
        return stream is not None and stream.isatty() and can_rewrite_lines() and not rank()
    except ValueError:  # isatty() of a closed file
        return False


def in_notebook() -> bool:
    """Whether standard output is a cell's: Jupyter, Colab, VS Code, nbconvert.

    Where a caller has redirected it (`contextlib.redirect_stdout`), it is not.
    """
    # Asked of what is loaded: a program without IPython is no notebook.
    shell = sys.modules.get("IPython")
    if (
        rank()
        or shell is None
        or not type(sys.stdout).__module__.startswith(("ipykernel", "google.colab"))
    ):
        return False
    return getattr(shell.get_ipython(), "kernel", None) is not None


@contextlib.contextmanager
def watched_bars(*, downloads: bool = False) -> Iterator[None]:
    """transformers' bars where somebody watches: a terminal, or a download into a notebook."""
    from transformers.utils import logging

    is_watched = in_terminal() or (downloads and in_notebook())
    if is_watched or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def show(shown: Any) -> None:
    """Show something that has `__str__` and `_repr_html_`: as HTML in a notebook, else as text."""
    if not in_notebook():
        say(str(shown))
        return
    from IPython.display import display

    display(shown)


def size(count: float) -> str:
    """A number of bytes in words: `512 KiB`, `1.3 GiB`."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if count >= 100 else f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"


def gib(count: float) -> str:
    """A number of bytes in GiB, without the unit: two digits after the point below a half."""
    return f"{count / 2**30:.1f}" if count >= 2**29 else f"{count / 2**30:.2f}"


def duration(seconds: float) -> str:
    """A duration in words a person reads at a glance: `42 s`, `3 min 05 s`, `2 h 07 min`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
