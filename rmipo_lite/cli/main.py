"""The command `rmipo-lite`: train, inspect, estimate, compare, generate, merge, and others.

Exit codes: 0 done, 1 an error (one sentence on standard error; `--debug` shows the traceback),
2 a wrong command line, 130 interrupted. Imports happen inside the commands, so that `--help`
answers at once.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from rmipo_lite.cli import runs
from rmipo_lite.cli.contenders import methods_of
from rmipo_lite.cli.launch import launch, leave_the_others
from rmipo_lite.cli.parser import OWN_NAMES, parser_for
from rmipo_lite.output.console import is_launched, printable, rank, say
from rmipo_lite.output.redaction import redact_text

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
_LONGEST_MESSAGE = 1000  # characters of an error that reach the terminal


def _complain(text: str) -> None:
    sys.stderr.write(f"rmipo-lite: {printable(text)}\n")


def _options(command: str, given: dict[str, Any], *needed: str) -> dict[str, Any]:
    """Options from the command line and the file it names, as typed values.

    Raises UsageError where one of the needed ones is missing.
    """
    from rmipo_lite.cli.config_options import UsageError, read_options_file, read_values

    file = given.pop("config", None)
    options = {} if file is None else read_options_file(file, OWN_NAMES[command])
    options = read_values(options | given)
    missing = [name for name in needed if options.get(name) is None]
    if missing:
        words = " ".join(name.upper() for name in needed)
        raise UsageError(
            f"{command}: {' and '.join(missing)} missing: rmipo-lite {command} {words}"
        )
    return options


def _train(given: dict[str, Any]) -> int:
    words = given.pop("words")
    options = _options("train", given, "model", "dataset")
    report, config = options.pop("report", None), options.pop("accelerate_config", None)
    processes = options.pop("num_processes", None)
    if processes is not None and int(processes) < 1:
        raise ValueError(f"num_processes must be at least 1, got {processes}")
    if (config or int(processes or 1) > 1) and not is_launched():
        code = launch(words, processes and int(processes), config or "multi_gpu")
        if code is not None:
            return code
    import rmipo_lite

    result = rmipo_lite.train(options.pop("model"), options.pop("dataset"), **options)
    say(repr(result))
    if report and not rank():
        result.report(None if report is True else report)
    if result.unsaved is not None:
        return FAILED
    return OK if result.stopped_at_step is None else INTERRUPTED


def _inspect(given: dict[str, Any]) -> int:
    options = _options("inspect", given, "dataset")
    report, top = options.pop("report", None), options.pop("top", 3)
    import rmipo_lite

    inspection = rmipo_lite.inspect(options.pop("dataset"), options.pop("model", None), **options)
    say(inspection.text(top))
    if report is not None:
        inspection.report(report)
    return OK


def _estimate(given: dict[str, Any]) -> int:
    options = _options("estimate", given, "model")
    import rmipo_lite

    say(str(rmipo_lite.estimate(options.pop("model"), options.pop("dataset", None), **options)))
    return OK


def _compare(given: dict[str, Any]) -> int:
    options = _options("compare", given, "model", "dataset")
    report, wanted = options.pop("report", None), options.pop("methods", None)
    if wanted is not None:
        options["methods"] = methods_of(wanted)
    import rmipo_lite

    found = rmipo_lite.compare(options.pop("model"), options.pop("dataset"), **options)
    say(str(found))
    if report:
        found.report(None if report is True else report)
    if found.failed:
        return FAILED
    return OK if len(found.results) == found.planned else INTERRUPTED


def _demo(given: dict[str, Any]) -> int:
    from rmipo_lite.demo.run import run_demo

    say(run_demo(**given).summary())
    return OK


def _info(given: dict[str, Any]) -> int:
    from rmipo_lite.environment import info

    say(str(info()))
    return OK


def _selftest(given: dict[str, Any]) -> int:
    from rmipo_lite.selftest.command import run

    return run(argparse.Namespace(**given))


def _known_options(parser: argparse.ArgumentParser, command: str | None) -> list[str]:
    subparsers = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    chosen = subparsers.choices[command] if command else parser
    return [text for action in chosen._actions for text in action.option_strings]


# What imports PyTorch and transformers before anything else, for seconds.
_SLOW_TO_START = {
    "train", "compare", "chat", "generate", "compare-answers", "merge", "export", "figures",
}  # fmt: skip
_HELP = {"-h", "--help", "--help-all"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code (also the entry point of `rmipo-lite`)."""
    words = list(sys.argv[1:] if argv is None else argv)
    if is_launched() and words[:1] != ["train"]:
        if rank():
            return OK  # it is no work for several processes: the first does it
        leave_the_others()
    if not rank() and words and words[0] in _SLOW_TO_START and not _HELP & set(words):
        _complain("starting")
    parser = parser_for(words)
    try:
        options, unknown = parser.parse_known_args(words)
    except SystemExit as stop:  # argparse has printed help, version or its own complaint
        return int(stop.code or 0)
    given = vars(options)
    command = given.pop("command")
    if unknown:
        from rmipo_lite.cli.config_options import nearest

        word = unknown[0].split("=")[0]
        hint = nearest(word, _known_options(parser, command))
        _complain(f"unknown option or argument {word!r}{hint}")
        return USAGE
    if command is None:
        parser.print_help()
        return USAGE
    if command == "train":
        given["words"] = words
    return _run(command, given)


COMMANDS = {
    "train": _train, "inspect": _inspect, "estimate": _estimate, "compare": _compare,
    "demo": _demo, "info": _info, "selftest": _selftest, "chat": runs.chat,
    "generate": runs.generate,
    "compare-answers": runs.compare_answers, "merge": runs.merge, "export": runs.export,
    "figures": runs.figures,
}  # fmt: skip


def _run(command: str, given: dict[str, Any]) -> int:
    from rmipo_lite.cli.config_options import UsageError

    debug = given.pop("debug", False)
    try:
        return COMMANDS[command](given)
    except KeyboardInterrupt:
        ways = {
            "train": "; `--resume` goes on from the last checkpoint",
            "compare": "; the same command with its --output_dir goes on",
        }
        way = ways.get(command, "")
        _complain("interrupted" + way)
        return INTERRUPTED
    except UsageError as error:
        _complain(str(error))
        return USAGE
    except Exception as error:
        if debug:
            raise
        message = " ".join(redact_text(str(error)).split()) or type(error).__name__
        _complain(f"error: {message[:_LONGEST_MESSAGE]} (--debug shows where)")
        return FAILED


if __name__ == "__main__":
    sys.exit(main())
