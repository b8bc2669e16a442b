"""The documentation's table of what is promised, with the counts of a run of the scorecard.

python -m tests.trials --json benchmarks/trials.json --table docs/promises.md
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.report import put_between

MARK = "selftest"
# What a user is promised, and the checks that try to break it.
PROMISES: tuple[tuple[str, tuple[int, ...]], ...] = (
    ("A run killed, interrupted or out of disk resumes bit for bit", (1, 5, 13, 14, 44)),
    ("An adapter loads and merges to the same logits, an earlier release's too", (26, 45)),
    ("A damaged checkpoint is found and named, the one before is used", (7,)),
    ("NaN and inf change no weight; their pair is dropped, named, counted", (2, 21)),
    ("Every row is kept, dropped or refused with its reason", (3, 37)),
    ("Prompt, answer, BOS and end of turn lie where they belong", (8, 10, 11)),
    ("The numbers are the method's, and those of float64", (4, 12, 22, 24)),
    ("No pair sees its company, its padding or its split", (6, 20, 23, 25, 32)),
    ("Every option is followed, or refused by name before the run", (46,)),
    ("Wrong calls of the kernels raise; none ends the process", (15, 19, 41)),
    ("Without kernels, compiler or cache it trains all the same", (17, 18)),
    ("Your model, tokenizer, process and memory are as before", (27, 28)),
    ("A run that several processes share is that of one, with faults in it", (47, 48, 49)),
    ("The log adds up, evaluation changes nothing", (29, 30)),
    ("Warned of before: swapped labels, length bias, time, memory, disk", (38, 39)),
    ("No code of a stranger runs, no secret is written, output fits its place", (34, 35, 36)),
)


def table(content: dict[str, Any]) -> str:
    """Markdown of the promises from the scorecard's JSON."""
    checks = {check["number"]: check for check in content["checks"] if check["absent"] is None}
    lines = ["| promise | checks | trials | lost |", "|---|---|---|---|"]
    for promise, numbers in PROMISES:
        own = [checks[number] for number in numbers if number in checks]
        trials, lost = sum(c["trials"] for c in own), sum(c["lost"] for c in own)
        named = ", ".join(str(check["number"]) for check in own)
        lines.append(f"| {promise} | {named} | {trials:,} | {lost} |")
    versions = content["versions"]
    option = "" if content["trials"] == "tenth" else f" --trials {content['trials']}"
    lines.append("")
    lines.append(
        f"{content['total']} (`python -m tests.trials{option}`, seed {content['seed']}, "
        f"{content['date']}, torch {versions['torch']}, transformers {versions['transformers']})."
    )
    return "\n".join(lines)


def write_table(content: dict[str, Any], page: Path) -> None:
    """Write the table of a scorecard's JSON into a page."""
    put_between(page, MARK, table(content))
