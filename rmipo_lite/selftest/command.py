"""`rmipo-lite selftest`: its options, which take no library to know, and what it does."""

import argparse
from pathlib import Path

from rmipo_lite.selftest.processes import start_server


def numbers(text: str) -> list[int]:
    """`4,15` as [4, 15]."""
    return [int(word) for word in text.split(",") if word]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give a parser the options of the command."""
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE",
        help="the outcome as JSON, to FILE beside the table, or to standard output instead of it",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of every random choice (default: 0)")
    parser.add_argument("--only", type=numbers, default=[], metavar="N,N", help="these checks")
    # Not called debug: a lost trial is no exception of the command.
    parser.add_argument("--debug", dest="tracebacks", action="store_true", help="show tracebacks")
    parser.add_argument("--quick", action="store_true", help="nothing more: it is quick")


def run(given: argparse.Namespace) -> int:
    """Do what the options say; the exit code is 1 when anything was lost."""
    start_server()  # it imports while we do
    from rmipo_lite.output.console import say
    from rmipo_lite.selftest.run import as_json, selftest

    show = given.json != "-"
    outcomes = selftest(given.only, given.seed, show=show, debug=given.tracebacks)
    text = as_json(outcomes, seed=given.seed)
    if not show:
        say(text)
    elif given.json:
        Path(given.json).write_text(text + "\n", encoding="utf-8")
    return int(any(outcome.losses for outcome in outcomes))
