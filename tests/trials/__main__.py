"""`python -m tests.trials`: the scorecard, a row a check; 1 when a trial was lost."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rmipo_lite.selftest.command import numbers
from rmipo_lite.selftest.run import as_json
from tests.trials.run import amount, scorecard


def main(words: list[str] | None = None) -> int:
    """Run what the options ask for."""
    parser = argparse.ArgumentParser(prog="python -m tests.trials", allow_abbrev=False)
    parser.add_argument(
        "--trials", type=amount, default="tenth", metavar="tenth|all|N",
        help="how many of each check (default: tenth)",
    )  # fmt: skip
    parser.add_argument("--only", type=numbers, default=[], metavar="N,N", help="these checks")
    parser.add_argument("--trial", type=int, metavar="INDEX", help="repeat one trial of --only")
    parser.add_argument("--seed", type=int, default=0, help="of every random choice (default: 0)")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcome there")
    parser.add_argument(
        "--table", type=Path, metavar="FILE", help="write the table of promises between its marks"
    )
    given = parser.parse_args(words)
    try:
        outcomes = scorecard(
            given.trials, seed=given.seed, only=given.only, trial=given.trial, debug=given.debug
        )
    except ValueError as error:
        parser.error(str(error))
    text = as_json(outcomes, trials=given.trials, seed=given.seed)
    if given.json:
        given.json.write_text(text + "\n", encoding="utf-8")
    if given.table:
        from tests.trials.promises import write_table

        write_table(json.loads(text), given.table)
    return int(any(outcome.lost for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
