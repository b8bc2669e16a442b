"""The command `rmipo-lite`: train, demo, info, selftest, bench.

Exit codes: 0 done, 1 an error (one sentence on standard error; `--debug` shows the traceback),
2 a wrong command line, 130 interrupted. Imports happen inside the commands, so that `--help`
answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from rmipo_lite import __version__
from rmipo_lite.display import printable, say
from rmipo_lite.redaction import redact_text

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
_LONGEST_MESSAGE = 1000  # characters of an error that reach the terminal
# what `train` takes beside the config's options
_TRAIN_NAMES = (
    "model", "dataset", "eval_dataset", "output_dir", "quantization", "resume", "report",
)  # fmt: skip


def _complain(text: str) -> None:
    sys.stderr.write(f"rmipo-lite: {printable(text)}\n")


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rmipo-lite",
        description="Align a language model with preference pairs (RMiPO) on one GPU or a CPU.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"rmipo_lite {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="{train,demo,info,selftest,bench}")
    _add_train(commands, argv)
    demo = commands.add_parser(
        "demo", help="train the embedded tiny model; no network, about a minute", allow_abbrev=False
    )
    demo.add_argument("--output_dir", "--output-dir", default="rmipo-demo", help="folder to write")
    demo.add_argument("--seed", type=int, default=0, help="seed of the run (default: 0)")
    info = commands.add_parser(
        "info", help="versions, device, precision, which operators run and why", allow_abbrev=False
    )
    bench = commands.add_parser(
        "bench",
        help="measure against the authors' step, trl, liger and the bare matrix products",
        description="Measure on the CPU and write rows to OUTPUT_DIR/<what>.csv; report makes the "
        "README's table and a plot from all rows. Peers: pip install 'rmipo-lite[bench]'.",
        allow_abbrev=False,
    )
    bench.add_argument(
        "what", choices=("head", "step", "memory", "data", "methods", "gpu", "report")
    )
    bench.add_argument(
        "--output_dir", "--output-dir", default="benchmarks", help="folder of the rows"
    )
    bench.add_argument("--quick", action="store_true", help="one small shape: does it run?")
    bench.add_argument("--pairs", help="data: preference pairs (default: the demo's)")
    bench.add_argument("--tokenizer", help="data: folder of a tokenizer (default: the demo's)")
    _add_selftest(commands)
    for command in (demo, info, bench):
        command.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def _add_train(commands: Any, argv: Sequence[str]) -> None:
    train = commands.add_parser(
        "train",
        help="train a model on preference pairs",
        description="Train MODEL (a hub name or folder) on DATASET (a .jsonl, .json, .csv or "
        ".parquet file, also .gz, or a hub name) with columns prompt, chosen, rejected.",
        usage="rmipo-lite train MODEL DATASET [--config FILE] [options]",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    if list(argv[:1]) != ["train"]:
        return  # its options come from the config, whose import takes seconds
    from rmipo_lite.cli_options import add_config_options

    train.add_argument("model", nargs="?", help="hub name or folder of the model")
    train.add_argument("dataset", nargs="?", help="file or hub name of the preference pairs")
    train.add_argument("--config", metavar="FILE", help="options in YAML; the command line wins")
    train.add_argument(
        "--eval_dataset", "--eval-dataset", help="held-out pairs; else 5 %% are held out"
    )
    train.add_argument(
        "--output_dir", "--output-dir", help="folder of the run (default: rmipo-<model name>)"
    )
    train.add_argument(
        "--quantization",
        choices=("auto", "none", "4bit"),
        help="4-bit weights (NF4); auto: on CUDA when the model would not fit otherwise",
    )
    train.add_argument(
        "--resume",
        nargs="?",
        const=True,
        metavar="CHECKPOINT",
        help="go on from the newest valid checkpoint of --output_dir, or from the given one",
    )
    train.add_argument(
        "--report", nargs="?", const=True, metavar="FILE", help="write an HTML report of the run"
    )
    train.add_argument("--debug", action="store_true", help="show tracebacks")
    show_all = "--help-all" in argv
    train.add_argument("--help-all", action="help", help="this help with transformers' options too")
    add_config_options(train, show_all=show_all)


def _add_selftest(commands: Any) -> None:
    selftest = commands.add_parser(
        "selftest",
        help="try to lose a run (kills, full disks, bad numbers, bad rows) and count how often",
        description="Run the reliability scorecard, a row per check; the exit code is 1 when a "
        "trial was lost. No network, minutes; --quick takes less than one.",
        allow_abbrev=False,
    )
    depth = selftest.add_mutually_exclusive_group()
    for mode, text in (("quick", "under a minute"), ("soak", "every trial of the scorecard")):
        depth.add_argument(
            f"--{mode}", dest="mode", action="store_const", const=mode, default="default", help=text
        )
    selftest.add_argument(
        "--json", nargs="?", const="-", metavar="FILE",
        help="the outcome as JSON, to FILE beside the table, or to standard output instead of it",
    )  # fmt: skip
    selftest.add_argument("--seed", type=int, default=0, help="of every random choice (default: 0)")
    selftest.add_argument("--only", metavar="N,N", default="", help="these checks alone")
    selftest.add_argument("--trial", type=int, metavar="INDEX", help="repeat one trial of --only")
    # its lost trials are no exceptions of the command
    selftest.add_argument("--debug", dest="tracebacks", action="store_true", help="show tracebacks")


def _train(given: dict[str, Any]) -> int:
    from rmipo_lite.cli_options import UsageError, read_options_file, read_values

    file = given.pop("config", None)
    options = {} if file is None else read_options_file(file, _TRAIN_NAMES)
    options = read_values(options | given)
    missing = [name for name in ("model", "dataset") if options.get(name) is None]
    if missing:
        raise UsageError(f"train: {' and '.join(missing)} missing: rmipo-lite train MODEL DATASET")
    report = options.pop("report", None)
    import rmipo_lite

    result = rmipo_lite.train(options.pop("model"), options.pop("dataset"), **options)
    say(repr(result))
    if report:
        result.report(None if report is True else report)
    if result.unsaved is not None:
        return FAILED
    return OK if result.stopped_at_step is None else INTERRUPTED


def _demo(given: dict[str, Any]) -> int:
    from rmipo_lite.demo.run import run_demo

    say(run_demo(**given).summary())
    return OK


def _info(given: dict[str, Any]) -> int:
    from rmipo_lite.environment import info

    say(str(info()))
    return OK


def _selftest(given: dict[str, Any]) -> int:
    from pathlib import Path

    from rmipo_lite.cli_options import UsageError
    from rmipo_lite.selftest.run import as_json, selftest

    try:
        only = [int(word) for word in given["only"].split(",") if word]
    except ValueError:
        raise UsageError(f"selftest: --only wants numbers, got {given['only']!r}") from None
    mode, seed, file = given["mode"], given["seed"], given["json"]
    outcomes = selftest(mode, seed=seed, only=only, trial=given["trial"], show=file != "-",
                        debug=given["tracebacks"])  # fmt: skip
    if file is not None:
        text = as_json(outcomes, mode, seed)
        if file == "-":
            say(text)
        else:
            Path(file).write_text(text + "\n", encoding="utf-8")
    return FAILED if any(outcome.lost for outcome in outcomes) else OK


def _bench(given: dict[str, Any]) -> int:
    from pathlib import Path

    from rmipo_lite.bench import report, run

    what, folder = given.pop("what"), Path(given.pop("output_dir"))
    if what == "report":
        rows = report.read_all(folder)
        report.draw(folder / report.PLOT, rows)
        readme = folder.resolve().parent / "README.md"
        report.put_between(readme, report.MARK, report.table(rows))
        say(report.table(rows))
        return OK
    files = {
        name: None if (path := given.pop(name)) is None else Path(path)
        for name in ("pairs", "tokenizer")
    }
    say(f"Rows are in {run.run(what, folder, quick=given['quick'], **files)}")
    return OK


def _known_options(parser: argparse.ArgumentParser, command: str | None) -> list[str]:
    subparsers = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    chosen = subparsers.choices[command] if command else parser
    return [text for action in chosen._actions for text in action.option_strings]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code (also the entry point of `rmipo-lite`)."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = _parser(words)
    try:
        options, unknown = parser.parse_known_args(words)
    except SystemExit as stop:  # argparse has printed help, version or its own complaint
        return int(stop.code or 0)
    given = vars(options)
    command = given.pop("command")
    if unknown:
        from rmipo_lite.cli_options import nearest

        word = unknown[0].split("=")[0]
        hint = nearest(word, _known_options(parser, command))
        _complain(f"unknown option or argument {word!r}{hint}")
        return USAGE
    if command is None:
        parser.print_help()
        return USAGE
    return _run(command, given)


COMMANDS = {
    "train": _train, "demo": _demo, "info": _info, "selftest": _selftest, "bench": _bench,
}  # fmt: skip


def _run(command: str, given: dict[str, Any]) -> int:
    from rmipo_lite.cli_options import UsageError

    debug = given.pop("debug", False)
    try:
        return COMMANDS[command](given)
    except KeyboardInterrupt:
        _complain("interrupted; `--resume` goes on from the last checkpoint")
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
