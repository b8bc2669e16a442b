"""Cases of check 35 on chat templates and data files."""

from __future__ import annotations

import functools
import gzip
import json
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from rmipo_lite.data import files
from rmipo_lite.data.report import DataReport
from rmipo_lite.data.rows import load_rows
from rmipo_lite.system import memory
from rmipo_lite.tokens import template_limits
from rmipo_lite.tokens.options import TokenizationOptions
from rmipo_lite.tokens.pair import TokenizedPair
from rmipo_lite.tokens.templates import prepare_tokenizer
from rmipo_lite.tokens.tokenize_rows import encode_prompt, tokenize_rows
from tests.kit import byte_level
from tests.trials.scorecard import Lost, expect

MiB = 2**20
_ROW = {"prompt": "Hi", "chosen": "yes", "rejected": "no"}
_CHAT = {
    "prompt": [{"role": "user", "content": "Hi"}],
    "chosen": [{"role": "assistant", "content": "yes"}],
    "rejected": [{"role": "assistant", "content": "no"}],
}


@dataclass(frozen=True)
class Bench:
    """Where a case works.

    Attributes:
        folder: its own, empty at first; nothing may be written beside it.
        saved: a model in `base`, an adapter on it in `adapter`, a run in `run`.
        marker: what code makes that should never have run.
    """

    folder: Path
    saved: Path
    marker: Path


def expect_refused(call: Callable[[], Any], *words: str) -> None:
    """Lose the trial unless the call is refused in one or two sentences with these words."""
    try:
        call()
    except Exception as error:
        message = str(error)
        if not isinstance(error, ValueError | OSError) and "Checkpoint" not in type(error).__name__:
            raise
    else:
        raise Lost("nothing was refused")
    for word in words:
        expect(word in message, f"{word!r} is not in the message: {message[:300]}")
    expect(len(message) < 700, f"a message of {len(message)} characters")


# ---- templates ------------------------------------------------------------------------------

_TURNS = (
    "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }};{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
_ESCAPES = (
    "{{ ''.__class__.__mro__ }}",
    "{{ ''.__class__.__base__.__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}",
    "{{ lipsum.__globals__['os'].system('touch MARKER') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ (''|attr('__class__')).__mro__ }}",
    "{{ ''|attr('__cla' ~ 'ss__')|attr('__mro__') }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ '%s'.format.__globals__ }}",
    "{{ raise_exception.__globals__['__builtins__']['open']('MARKER', 'w') }}",
    "{{ strftime_now.__closure__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{% set x = messages.append(1) %}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('touch MARKER') }}",
)
_HARMLESS = "prompt: wanted a conversation that the chat template takes, got one it refuses"


def _template(template: str, **options: Any) -> tuple[list[TokenizedPair], DataReport]:
    rows, report = load_rows([_CHAT])
    settings = TokenizationOptions(chat_template=template, **options)
    try:
        return tokenize_rows(rows, byte_level(), settings, report), report
    except ValueError:
        if report.kept:
            raise
    return [], report


def _escapes(bench: Bench) -> None:
    """What would reach Python's objects is refused, or found empty."""
    plain, _ = _template(_TURNS)
    for escape in _ESCAPES:
        pairs, report = _template(escape.replace("MARKER", str(bench.marker)) + _TURNS)
        if pairs:
            expect(pairs == plain, f"{escape} wrote something")
        else:
            expect(list(report.refused) == [_HARMLESS], f"{escape}: {report}")


def _endless(bench: Bench) -> None:
    """Loops in loops end in training, in the authors' form and in generation."""
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with mock.patch.object(template_limits, "RENDER_SECONDS", 0.2):
        words = ("chat_template", "took more than 0.2 s")
        expect_refused(lambda: _template(loops + _TURNS), *words)
        authors = {"mode": "authors", "max_length": 64, "max_prompt_length": 32}
        expect_refused(lambda: _template(loops + _TURNS, **authors), *words)
        tokenizer = prepare_tokenizer(byte_level(), loops + _TURNS)
        expect_refused(lambda: encode_prompt(_CHAT["prompt"], tokenizer), *words)


def _eats_memory(bench: Bench) -> None:
    """A text that doubles, and one that is long at once."""
    if not memory.CAN_LIMIT:
        return
    with (
        mock.patch.object(template_limits, "RENDER_BYTES", 512 * MiB),
        mock.patch.object(template_limits, "RENDER_SECONDS", 600.0),  # however busy the machine is
    ):
        for eater in (
            "{{ 'a' * 99999999999 }}",
            "{% for a in range(99999) %}{{ 'a' * 1000000 }}{% endfor %}",
            "{% set n = namespace(x='aaaaaaaa') %}"
            "{% for a in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        ):
            expect_refused(functools.partial(_template, eater + _TURNS), "0.5 GiB")


# ---- data files -----------------------------------------------------------------------------


@contextmanager
def _memory(limit: int) -> Iterator[None]:
    """Lose the trial where Python's memory grows by more than `limit` bytes."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        yield
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    expect(peak < limit, f"{peak / MiB:.0f} MiB were taken, {limit / MiB:.0f} are allowed")


def _line(**changes: Any) -> bytes:
    return json.dumps(_ROW | changes).encode() + b"\n"


def _gzip_bomb(bench: Bench) -> None:
    path = bench.folder / "bomb.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(64):
            file.write(bytes(MiB))
    with mock.patch.object(files, "GZIP_FREE_BYTES", MiB), _memory(64 * MiB):
        expect_refused(lambda: load_rows(path), "bomb.jsonl.gz", "200 times its size")


def _long_line(bench: Bench) -> None:
    """A line of a gigabyte costs itself alone, and never lies in memory whole."""
    path = bench.folder / "long.jsonl"
    size = 2**30
    with path.open("wb") as file:
        file.write(_line())
        file.truncate(size)  # zeros that take no room on the disk
        file.seek(0, 2)
        file.write(b"\n" + _line(prompt="Ho"))
    with _memory(64 * MiB):
        rows, report = load_rows(path)
    expect([row.prompt for row in rows] == ["Hi", "Ho"], f"{report}")
    expect([tally.rows for tally in report.refused.values()] == [[1]], f"{report}")


def _long_csv_line(bench: Bench) -> None:
    path = bench.folder / "long.csv"
    with path.open("wb") as file:
        file.write(b"prompt,chosen,rejected\n")
        file.truncate(2**26)
    with mock.patch.object(files, "MAX_LINE_BYTES", MiB), _memory(32 * MiB):
        expect_refused(lambda: load_rows(path), "long.csv", "a line longer than")


def _deep(bench: Bench) -> None:
    """A hundred thousand levels, in a line and as a document."""
    depth = 100_000
    path = bench.folder / "deep.jsonl"
    deep = b'{"a":' * depth + b"1" + b"}" * depth
    path.write_bytes(_line() + deep + b"\n" + b"[" * depth + b"\n" + _line(prompt="Ho"))
    rows, report = load_rows(path)
    expect([row.index for row in rows] == [0, 3], f"{report}")
    expect(report.refused_count == 2, f"{report}")
    document = bench.folder / "deep.json"
    document.write_bytes(b"[" * depth + b"]" * depth)
    expect_refused(lambda: load_rows(document), "deep.json", "JSON")


def _odd_json(bench: Bench) -> None:
    """Keys twice, constants that JSON hasn't, numbers without end: each costs its row alone."""
    lines = (
        b'{"prompt":"a","chosen":"b","chosen":"c","rejected":"d"}',
        b'{"prompt":NaN,"chosen":"b","rejected":"c"}',
        b'{"prompt":"a","chosen":Infinity,"rejected":"c"}',
        b'{"prompt":"a","chosen":"b","rejected":' + b"9" * 100_000 + b"}",
        b'{"prompt":"a","chosen":"b","rejected":"\xff\xfe"}',
        b'{"prompt":"a","chosen":"b","rejected":"\\ud800"}',
        b'{"prompt":"a","chosen":"b","rejected":"c"',
        b"null",
    )
    path = bench.folder / "odd.jsonl"
    path.write_bytes(_line() + b"".join(line + b"\n" for line in lines))
    rows, report = load_rows(path)
    expect([row.index for row in rows] == [0], f"{report}")
    named = sorted(row for tally in report.refused.values() for row in tally.rows)
    expect(named == list(range(1, len(lines) + 1)), f"named: {named}")


def _encodings(bench: Bench) -> None:
    """A mark at the start, line ends of Windows and no last end change nothing; UTF-16 is named."""
    plain = b"".join(_line(prompt=str(number)) for number in range(3))
    wanted = [row.prompt for row in load_rows(_written(bench, "a.jsonl", plain))[0]]
    for content in (
        b"\xef\xbb\xbf" + plain,
        plain.replace(b"\n", b"\r\n"),
        plain.replace(b"\n", b"\n\n \n"),
        plain.rstrip(b"\n"),
        gzip.compress(b"\xef\xbb\xbf" + plain),
    ):
        found = [row.prompt for row in load_rows(_written(bench, "b.jsonl", content))[0]]
        expect(found == wanted, f"{content[:40]!r} is read as {found}")
    for name in ("c.jsonl", "c.csv", "c.json"):
        path = _written(bench, name, plain.decode().encode("utf-16"))
        expect_refused(functools.partial(load_rows, path), name, "UTF-16")


def _written(bench: Bench, name: str, content: bytes) -> Path:
    (bench.folder / name).write_bytes(content)
    return bench.folder / name


def _saved_dataset(bench: Bench) -> None:
    """A saved dataset whose own files name others, in the folder above."""
    import datasets

    folder = bench.folder / "saved"
    datasets.DatasetDict(train=datasets.Dataset.from_list([_ROW])).save_to_disk(str(folder))
    state = folder / "train" / "state.json"
    whole = state.read_text()
    state.write_text(whole.replace('"data-', '"../train/data-'))
    expect_refused(lambda: load_rows(folder), "a name inside the folder")
    state.write_text(whole)
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["../saved/train"]}))
    expect_refused(lambda: load_rows(folder), "a name inside the folder")


CASES: dict[str, Callable[[Bench], None]] = {
    "templates that reach for Python": _escapes,
    "a template without end": _endless,
    "a template that eats memory": _eats_memory,
    "a gzip bomb": _gzip_bomb,
    "a line of a gigabyte": _long_line,
    "a CSV line without end": _long_csv_line,
    "JSON a hundred thousand levels deep": _deep,
    "odd JSON": _odd_json,
    "odd encodings": _encodings,
    "a saved dataset that names files outside": _saved_dataset,
}
