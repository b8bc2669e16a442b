"""The command line: `python -m benchmarks step`, from the project's root."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure against the authors' step, trl, liger and the bare matrix products, "
        "on the CPU (gpu: on an NVIDIA GPU; roofline: counted for cards), and write rows to "
        "OUTPUT_DIR/<name>.csv; report makes the tables of docs/performance.md and a plot from "
        "all rows. "
        "Peers: pip install -e '.[bench]'.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "name",
        choices=(
            "head",
            "step",
            "memory",
            "estimate",
            "data",
            "merge",
            "methods",
            "compare",
            "dpo",
            "processes",
            "claims",
            "growth",
            "busy",
            "drift",
            "real",
            "roofline",
            "gpu",
            "report",
        ),
    )
    parser.add_argument(
        "--output_dir",
        "--output-dir",
        type=Path,
        default=Path(__file__).resolve().parent,
        help="folder of the rows (default: this one); docs/, where report writes, is beside it",
    )
    parser.add_argument("--quick", action="store_true", help="one small shape: does it run?")
    parser.add_argument(
        "--model",
        type=Path,
        help="merge, drift, claims, real: folder of a model (merge, drift: the demo's)",
    )
    parser.add_argument(
        "--world", choices=("gemma", "stories"), help="claims: whose --model that is (gemma)"
    )  # fmt: skip
    parser.add_argument(
        "--pairs", type=Path, help="data, merge, drift, real: pairs (default: the demo's)"
    )
    parser.add_argument(
        "--tokenizer", type=Path, help="data: folder of a tokenizer (default: the demo's)"
    )
    parser.add_argument(
        "--part",
        choices=("head", "step", "peers"),
        help="gpu: this alone, of the head, whole steps, and the head against other packages",
    )
    parser.add_argument("--seconds", type=float, help="gpu: for the whole steps together")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, or report what was measured."""
    parser = _parser()
    given = parser.parse_args(argv)
    # torch takes seconds, and --help should not.
    from benchmarks import claims, report, run
    from rmipo_lite.output.console import say

    folder: Path = given.output_dir.resolve()
    if given.name == "report":
        say(report.write(folder, folder.parent / report.PAGE))
        claims.write_page(folder)
        return
    if given.name == "claims":
        if given.world and (given.model is None or given.quick):
            parser.error("--world wants that world's --model, and no --quick")
        claims.run(folder, given.model, world_of=given.world or "gemma", quick=given.quick)
        return
    path = run.run(
        given.name,
        folder,
        quick=given.quick,
        pairs=given.pairs,
        tokenizer=given.tokenizer,
        model=given.model,
        part=given.part,
        seconds=given.seconds,
    )
    say(f"Rows are in {path}")


if __name__ == "__main__":
    main()
