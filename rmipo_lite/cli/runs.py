"""Commands on what a run left in its folder: chat, generate, compare-answers, merge, export."""

import argparse
import json
import signal
import sys
from pathlib import Path
from typing import Any

from rmipo_lite.output.console import printable, say

_RUN = "folder of a run, a checkpoint, or any adapter or model; also a hub name"
_OF_LOADING = ("bf16", "use_cpu")


def add_commands(commands: Any) -> None:
    """Their arguments and help."""
    for name, help_text in (
        ("generate", "answer prompts with the model of a run's folder"),
        ("compare-answers", "answers before and after training, side by side"),
    ):
        command = _command(commands, name, help_text)
        command.add_argument("prompts", nargs="*", metavar="PROMPT", help="texts to answer")
        command.add_argument(
            "--prompts", dest="file", metavar="FILE",
            help="more of them: a line each, or rows with a column `prompt` (.jsonl, .json, .csv, "
            ".parquet); - reads lines from standard input",
        )  # fmt: skip
        _add_generation(command, 128)
        command.add_argument("--output", metavar="FILE", help="write rows of JSON there too")
        command.add_argument(
            "--plain", action="store_true", help="take texts as they are, without chat template"
        )
    chat = _command(commands, "chat", "talk to the model of a run's folder, in this terminal")
    chat.add_argument("--system", metavar="TEXT", help="the conversation's first message")
    _add_generation(chat, 512)
    merge = _command(commands, "merge", "write the model with the run's adapter merged in")
    merge.add_argument("target", metavar="FOLDER", help="a new or empty folder")
    merge.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"),
        help="of the weights (default: that of the base model's files)",
    )  # fmt: skip

    export = _command(commands, "export", "write a GGUF file for llama.cpp, Ollama or LM Studio")
    export.add_argument("target", metavar="FILE", help="a new file, such as model.gguf")
    export.add_argument(
        "--format", default="f16", choices=("f32", "f16", "bf16", "q8_0", "q4_k_m"),
        help="(default: f16)",
    )  # fmt: skip
    export.add_argument("--adapter", action="store_true", help="the adapter alone, in float32")
    export.add_argument("--modelfile", action="store_true", help="Ollama's Modelfile beside it")
    export.add_argument(
        "--no_check", "--no-check", action="store_true", help="don't look at it in llama.cpp"
    )

    figures = commands.add_parser(
        "figures", help="the paper's figures from a run's numbers, as PNGs", allow_abbrev=False,
        description="Gamma by PMI gap, reward differences before and after, accuracy by PMI gap "
        "and length, dynamics and efficiency, each with a caption. No model is loaded.",
    )  # fmt: skip
    figures.add_argument("run", metavar="RUN", help="folder of a run that is over")
    figures.add_argument("--output_dir", "--output-dir", help="(default: RUN/figures)")
    figures.add_argument("--debug", action="store_true", help="show tracebacks")


def _add_generation(command: argparse.ArgumentParser, longest: int) -> None:
    command.add_argument(
        "--max_new_tokens", "--max-new-tokens", type=int, default=longest,
        help=f"(default: {longest})",
    )  # fmt: skip
    command.add_argument(
        "--temperature", type=float, help="sample at this temperature (default: greedy)"
    )
    command.add_argument("--seed", type=int, default=0, help="of the samples (default: 0)")


def _command(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text[:1].upper() + text[1:] + ".", allow_abbrev=False
    )
    command.add_argument("run", metavar="RUN", help=_RUN)
    command.add_argument(
        "--quantization", choices=("auto", "none", "4bit"), default="auto", help="as for train"
    )
    command.add_argument("--bf16", action="store_true", default=None, help="compute in bfloat16")
    command.add_argument("--use_cpu", "--use-cpu", action="store_true", help="take no GPU")
    command.add_argument("--debug", action="store_true", help="show tracebacks")
    return command


def chat(given: dict[str, Any]) -> int:
    """`rmipo-lite chat RUN`"""
    from rmipo_lite.cli.chat import talk

    talk(_load(given), given["system"], _generation(given))
    return 0


def generate(given: dict[str, Any]) -> int:
    """`rmipo-lite generate RUN PROMPT...`"""
    prompts = _prompts(given)
    answers = _load(given).generate(prompts, **_generation(given))
    for prompt, answer in zip(prompts, answers, strict=True):
        cut = "" if answer.ended else " [cut]"
        say(f"> {printable(_text(prompt))}\n{printable(answer)}{cut}\n")
    _write(
        given,
        [
            {"prompt": prompt, "answer": str(answer), "ended": answer.ended}
            for prompt, answer in zip(prompts, answers, strict=True)
        ],
    )
    return 0


def compare_answers(given: dict[str, Any]) -> int:
    """`rmipo-lite compare-answers RUN PROMPT...`"""
    found = _load(given).compare(_prompts(given), **_generation(given))
    say(str(found))
    _write(given, [{"prompt": p, "before": str(b), "after": str(a)} for p, b, a in found])
    return 0


def merge(given: dict[str, Any]) -> int:
    """`rmipo-lite merge RUN FOLDER`"""
    import torch

    dtype = None if given["dtype"] is None else getattr(torch, given["dtype"])
    _load(given).merge(given["target"], dtype=dtype)
    say(f"Merged model: {given['target']}")
    return 0


def export(given: dict[str, Any]) -> int:
    """`rmipo-lite export RUN FILE`; a SIGTERM leaves nothing behind either."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    _load(given).export_gguf(
        given["target"], given["format"], adapter_only=given["adapter"],
        modelfile=given["modelfile"], check=not given["no_check"],
    )  # fmt: skip
    return 0


def figures(given: dict[str, Any]) -> int:
    """`rmipo-lite figures RUN`"""
    from rmipo_lite.results.figures import figures_of
    from rmipo_lite.results.run_file import read_numbers

    folder = Path(given["run"])
    found = figures_of(read_numbers(folder))
    found.save(given["output_dir"] or folder / "figures")
    return 0


def _load(given: dict[str, Any]) -> Any:
    import torch

    import rmipo_lite

    torch.manual_seed(given.get("seed", 0))
    options = {name: value for name in _OF_LOADING if (value := given[name])}
    run = rmipo_lite.load_run(given["run"], quantization=given["quantization"], **options)
    if given.get("plain"):
        run.conversational = False
    return run


def _generation(given: dict[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = {"max_new_tokens": given["max_new_tokens"]}
    if given["temperature"] is not None:
        options |= {"do_sample": True, "temperature": given["temperature"]}
    return options


def _prompts(given: dict[str, Any]) -> list[Any]:
    from rmipo_lite.cli.config_options import UsageError

    prompts = list(given["prompts"])
    file = given["file"]
    if file == "-":
        prompts += [line.rstrip("\n") for line in sys.stdin if line.strip()]
    elif file is not None:
        prompts += _of_file(Path(file))
    if not prompts:
        raise UsageError("prompts missing: name some, or --prompts FILE")
    return prompts


def _of_file(path: Path) -> list[Any]:
    """A line each of a text file, else the distinct prompts of rows."""
    from rmipo_lite.cli.config_options import UsageError
    from rmipo_lite.data.files import SUFFIXES, read_file

    if Path(path.name.removesuffix(".gz")).suffix.lower() not in SUFFIXES:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    rows = [row for row in read_file(path) if isinstance(row, dict)]
    found = [row["prompt"] for row in rows if row.get("prompt")]
    if not found:
        raise UsageError(f"--prompts {path}: no row has a prompt")
    return list({json.dumps(prompt): prompt for prompt in found}.values())


def _text(prompt: Any) -> str:
    from rmipo_lite.model.generation import prompt_text

    return prompt_text(prompt)


def _write(given: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    if given["output"] is not None:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        Path(given["output"]).write_text("\n".join(lines) + "\n", encoding="utf-8")
        say(f"Rows: {given['output']}")
