"""What the command `rmipo-lite` understands: its commands, their arguments and help.

The options of `train`, `inspect` and `estimate` come from the config, whose import takes seconds:
they are added only where that command was called.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from rmipo_lite.cli import runs
from rmipo_lite.selftest.command import add_options
from rmipo_lite.version import __version__

# What these commands take beside the config's options; a file of options may hold them too.
OWN_NAMES = {
    "train": (
        "model",
        "dataset",
        "split",
        "eval_dataset",
        "eval_split",
        "num_processes",
        "accelerate_config",
        "output_dir",
        "quantization",
        "ref_model",
        "resume",
        "report",
    ),
    "inspect": ("dataset", "split", "model", "tokenizer", "output_dir", "report", "top"),
    "estimate": ("model", "dataset", "split", "tokenizer", "gpu", "num_gpus", "quantization"),
    "compare": (
        "model",
        "dataset",
        "methods",
        "learning_rates",
        "seeds",
        "judge",
        "output_dir",
        "split",
        "eval_dataset",
        "eval_split",
        "quantization",
        "ref_model",
        "prompts",
        "max_new_tokens",
        "report",
    ),
}
_ROWS = "file (.jsonl, .json, .csv, .parquet, also .gz) or hub name of the preference pairs"

_SPLIT = "which split of a dataset that has several (default: train, or the only one)"


def parser_for(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser for a command line of these words."""
    parser = argparse.ArgumentParser(
        prog="rmipo-lite",
        description="Align a language model with preference pairs (RMiPO) on one GPU or a CPU.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"rmipo_lite {__version__}")
    commands = parser.add_subparsers(
        dest="command",
        metavar="{train,inspect,estimate,compare,chat,generate,compare-answers,merge,export,"
        "figures,demo,info,selftest}",
    )
    _add_train(commands, argv)
    _add_inspect(commands, argv)
    _add_estimate(commands, argv)
    _add_compare(commands, argv)
    runs.add_commands(commands)
    demo = commands.add_parser(
        "demo", help="train the embedded tiny model; no network, about a minute", allow_abbrev=False
    )
    demo.add_argument("--output_dir", "--output-dir", default="rmipo-demo", help="folder to write")
    demo.add_argument("--seed", type=int, default=0, help="seed of the run (default: 0)")
    info = commands.add_parser(
        "info", help="versions, device, precision, which operators run and why", allow_abbrev=False
    )
    _add_selftest(commands)
    for command in (demo, info):
        command.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def _run_command(
    commands: Any, argv: Sequence[str], name: str, arguments: str, **texts: str
) -> Any:
    """A command with the config's options, or its name alone where another was called."""
    command = commands.add_parser(
        name,
        usage=f"rmipo-lite {name} {arguments} [--config FILE] [options]",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        **texts,
    )
    if list(argv[:1]) != [name]:
        return None
    from rmipo_lite.cli.config_options import add_config_options

    command.add_argument("--config", metavar="FILE", help="options in YAML; the command line wins")
    command.add_argument("--debug", action="store_true", help="show tracebacks")
    show_all = "--help-all" in argv
    command.add_argument(
        "--help-all", action="help", help="this help with transformers' options too"
    )
    add_config_options(command, show_all=show_all)
    return command


def _add_quantization(command: Any) -> None:
    command.add_argument(
        "--quantization",
        choices=("auto", "none", "4bit"),
        help="4-bit weights (NF4); auto: on CUDA when the model would not fit otherwise",
    )


def _add_train(commands: Any, argv: Sequence[str]) -> None:
    train = _run_command(
        commands, argv, "train", "MODEL DATASET",
        help="train a model on preference pairs",
        description="Train MODEL (a hub name or folder) on DATASET (a .jsonl, .json, .csv or "
        ".parquet file, also .gz, or a hub name) with columns prompt, chosen, rejected.",
    )  # fmt: skip
    if train is None:
        return
    train.add_argument("model", nargs="?", help="hub name or folder of the model")
    train.add_argument("dataset", nargs="?", help=_ROWS)
    train.add_argument(
        "--num_processes", "--num-processes", type=int, metavar="N",
        help="processes of this machine that share every step, one a GPU (default: 1)",
    )  # fmt: skip
    train.add_argument(
        "--accelerate_config", "--accelerate-config", metavar="NAME",
        help="how several processes share a model: multi_gpu (each has all of it; what "
        "--num_processes alone means), fsdp2 (each a part), or a file of accelerate's",
    )  # fmt: skip
    train.add_argument(
        "--eval_dataset", "--eval-dataset", help="held-out pairs; else 5 %% are held out"
    )
    train.add_argument("--split", help=_SPLIT)
    train.add_argument("--eval_split", "--eval-split", help="likewise of --eval_dataset")
    train.add_argument(
        "--output_dir", "--output-dir", help="folder of the run (default: rmipo-<model name>)"
    )
    _add_quantization(train)
    train.add_argument(
        "--ref_model", "--ref-model",
        help="what dpo and its kind measure from (default: the model as it came to the run)",
    )  # fmt: skip
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


def _add_compare(commands: Any, argv: Sequence[str]) -> None:
    compare = _run_command(
        commands, argv, "compare", "MODEL DATASET [--methods NAME ...]",
        help="train by several methods on the same pairs, side by side",
        description="Train MODEL on DATASET by each method, measure all on the same held-out pairs "
        "and prompts, and say what the differences are worth. A folder a run; what is there isn't "
        "made again.",
    )  # fmt: skip
    if compare is None:
        return
    compare.add_argument("model", nargs="?", help="hub name or folder of the model")
    compare.add_argument("dataset", nargs="?", help=_ROWS)
    compare.add_argument(
        "--methods", nargs="+", metavar="NAME[:OPTION=VALUE,...]",
        help="names, with options as dpo:beta=0.05; all: every one (default: rmipo simpo dpo)",
    )  # fmt: skip
    compare.add_argument(
        "--learning_rates", "--learning-rates", nargs="+", type=float, metavar="RATE",
        help="every method with each (default: a rate that each run finds)",
    )  # fmt: skip
    compare.add_argument(
        "--seeds", nargs="+", type=int, metavar="SEED", help="every method with each (default: 0)"
    )
    compare.add_argument("--judge", metavar="FOLDER", help="a reward model that judges answers")
    compare.add_argument("--output_dir", "--output-dir", help="folder; an earlier call's goes on")
    compare.add_argument(
        "--eval_dataset", "--eval-dataset", help="held-out pairs; else 10 %% are held out"
    )
    compare.add_argument("--split", help=_SPLIT)
    compare.add_argument("--eval_split", "--eval-split", help="likewise of --eval_dataset")
    _add_quantization(compare)
    compare.add_argument("--ref_model", "--ref-model", help="as for train")
    compare.add_argument("--prompts", type=int, help="held-out prompts to answer (default: 64)")
    compare.add_argument(
        "--max_new_tokens", "--max-new-tokens", type=int, help="of an answer (default: 128)"
    )
    compare.add_argument(
        "--report", nargs="?", const=True, metavar="FILE", help="write an HTML report"
    )


def _add_inspect(commands: Any, argv: Sequence[str]) -> None:
    inspect = _run_command(
        commands, argv, "inspect", "DATASET [--model MODEL]",
        help="look at preference pairs before training on them",
        description="Faults of DATASET, and with a model what it thinks of every pair: log-probs, "
        "PMI, gamma, loss weight, and the pairs that look wrong.",
    )  # fmt: skip
    if inspect is None:
        return
    inspect.add_argument("dataset", nargs="?", help=_ROWS)
    inspect.add_argument("--split", help=_SPLIT)
    inspect.add_argument("--model", help="hub name or folder of a model that scores the pairs")
    inspect.add_argument("--tokenizer", help="of which lengths are counted (default: the model's)")
    inspect.add_argument(
        "--output_dir", "--output-dir", help="folder of the scores; a second call goes on there"
    )
    inspect.add_argument("--report", metavar="FILE", help="write an HTML page")
    inspect.add_argument(
        "--top", type=int, help="suspicious pairs to print of each kind (default: 3)"
    )


def _add_estimate(commands: Any, argv: Sequence[str]) -> None:
    estimate = _run_command(
        commands, argv, "estimate", "MODEL [DATASET] [--gpu CARD]",
        help="memory and time of a run, and which cards it fits, without loading anything",
        description="Memory by part and time per epoch of training MODEL on DATASET, from the "
        "model's config alone, and what fits on common cards.",
    )  # fmt: skip
    if estimate is None:
        return
    estimate.add_argument("model", nargs="?", help="hub name or folder of the model")
    estimate.add_argument("dataset", nargs="?", help=_ROWS)
    estimate.add_argument("--split", help=_SPLIT)
    estimate.add_argument(
        "--gpu",
        help="a card (RTX 3060 12GB, T4, M2 Max 64GB), a size (12GB), numbers (24GB 165TFLOPS "
        "1TB/s) or cpu (default: this machine's)",
    )
    estimate.add_argument(
        "--num_gpus", "--num-gpus", type=int, default=1, metavar="N",
        help="such cards that share every step; both layouts are told of (default: 1)",
    )  # fmt: skip
    estimate.add_argument("--tokenizer", help="folder or name (default: the model's)")
    _add_quantization(estimate)


def _add_selftest(commands: Any) -> None:
    selftest = commands.add_parser(
        "selftest",
        help="does it work on this machine? half a minute, no network",
        description="Try what depends on this machine (kernels, libraries, disk, compiler, card), "
        "a row per check; the exit code is 1 when anything was lost. No network.",
        allow_abbrev=False,
    )
    add_options(selftest)
