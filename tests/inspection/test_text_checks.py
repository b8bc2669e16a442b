"""What is found in texts, in which rows, and that clean data has no findings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rmipo_lite.data.rows import load_rows
from rmipo_lite.demo import easy_rows as demo_rows
from rmipo_lite.inspection.text_checks import TextReport, check_texts
from tests.kit import chat_row, text_row

Record = dict[str, Any]
PROMPT = "Tell me something about number {} please"


def clean(count: int = 20) -> list[Record]:
    """Pairs with nothing to find, each with words of its own."""
    return [
        text_row(
            PROMPT.format(f"n{i} and m{i}"),
            f"Well a{i} stands before b{i} whereas c{i} follows.",
            f"No d{i} is known of e{i} because f{i} hides.",
        )
        for i in range(count)
    ]


def check(records: list[Record]) -> TextReport:
    return check_texts(load_rows(records)[0])


def found(records: list[Record]) -> dict[str, list[int]]:
    return {finding.name: finding.tally.rows for finding in check(records).findings}


def test_clean_pairs_have_no_finding() -> None:
    assert found(clean()) == {}


def test_unpaired_rows_are_looked_at_one_by_one() -> None:
    rows = [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": number % 2 == 0}
        for number, row in enumerate(clean(6))
    ]
    assert not check_texts(load_rows(rows, unpaired=True)[0]).findings
    rows += [{**rows[0], "label": False}, rows[1], {**rows[2], "completion": "Yes."}]
    report = check_texts(load_rows(rows, unpaired=True)[0])
    assert {finding.name: finding.tally.rows for finding in report.findings} == {
        "duplicates": [7], "near_duplicates": [6], "both_labels": [0, 6], "one_word": [8],
    }  # fmt: skip
    assert not report.similarity


def test_the_demo_has_nothing_but_its_seven_reworded_questions() -> None:
    report = check(demo_rows())
    assert [(f.name, f.level) for f in report.findings] == [("near_duplicates", "note")]
    assert report.findings[0].tally.count == 7


# Each puts rows behind twenty clean ones; the numbers are those of the rows that are to be found.
PLANTED: dict[str, tuple[list[Record], dict[str, list[int]]]] = {
    "exact duplicates": (clean(2), {"duplicates": [20, 21]}),
    "a duplicate but for whitespace": (
        [{k: v.replace(" ", "\n ") for k, v in clean(1)[0].items()}],
        {"duplicates": [20]},
    ),
    "swapped labels": (
        [text_row("p", "A good one.", "A bad one."), text_row("p ", "A bad one.", "A good one.")],
        {"contradicting_labels": [20, 21], "prompt_ends_in_space": [21]},
    ),
    "a circle of three": (
        [text_row("p", a, b) for a, b in (("A b.", "C d."), ("C d.", "E f."), ("E f.", "A b."))],
        {"preference_cycles": [20, 21, 22]},
    ),
    "a ranking is no circle": (
        [text_row("p", a, b) for a, b in (("A b.", "C d."), ("C d.", "E f."), ("A b.", "E f."))],
        {"chosen_and_rejected": [20, 21]},
    ),
    "the same responses under two prompts": (
        [text_row("p", "A b.", "C d."), text_row("q", "C d.", "A b.")],
        {},
    ),
    "one word": ([text_row("p", "Yes.", "Not at all, no."), text_row("q", "Well then.", "???")],
                 {"one_word": [20, 21]}),
    "the prompt repeated": (
        [chat_row(PROMPT, PROMPT + " It is one.", "No idea, sorry.")],
        {"repeats_prompt": [20]},
    ),
    "a short prompt begins many answers": ([chat_row("I", "I like it.", "You like it.")], {}),
    "marks of a template": (
        [
            text_row("p", "Sure thing.<|im_end|>", "Not now."),
            text_row("q", "Sure thing.\n\nHuman: and then?", "Not so."),
            chat_row("What? [/INST]", "That is it.", "This is it."),
            text_row("r", "It is fine to be careful.  Human", "It was right before."),
        ],
        {"role_marks": [20, 21, 22, 23]},
    ),
    "a text prompt writes its own marks": (
        [text_row("### Instruction:\nGo.\n### Response:\n", "I went.", "I stayed.")],
        {},
    ),
    "Human in a sentence": ([text_row("p", "A Human: what is it?", "The AI is human.")], {}),
    "blanks": (
        [text_row("p: ", "A b.", "C d."), text_row("q:", " A b.", "C d.")],
        {"prompt_ends_in_space": [20], "one_side_begins_blank": [21]},
    ),
    "both begin with a blank": ([text_row("q:", " A b.", " C d.")], {}),
    "almost equal": (
        [text_row("p", "a b c d e f g h i j.", "a b c d e f g h x j.")],
        {"almost_equal": [20]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_planted(name: str) -> None:
    rows, wanted = PLANTED[name]
    assert found(clean() + rows) == wanted


def test_several_circles_are_found_in_one_prompt_each() -> None:
    circle = ["A b.", "C d.", "E f.", "G h."]
    rows = [
        text_row(prompt, circle[i], circle[(i + 1) % 4]) for prompt in ("p", "q") for i in range(4)
    ]
    assert found(rows) == {"preference_cycles": list(range(8))}


def test_groups_of_near_duplicates_and_their_later_rows() -> None:
    rows = clean()
    longer = [{k: v + " and so on and on it goes" * 3 for k, v in row.items()} for row in rows]
    again = [dict(longer[i], chosen=longer[i]["chosen"] + " now") for i in (3, 3, 7)]
    again[1]["chosen"] += " then"
    report = check(longer + again)
    assert report.near_duplicates == [[3, 20, 21], [7, 22]]
    (finding,) = [f for f in report.findings if f.name == "near_duplicates"]
    assert finding.tally.rows == [20, 21, 22]
    assert finding.tally.example == "rows 3, 20, 21 are one group"


def test_an_end_mark_missing_counts_where_it_tells_the_sides_apart() -> None:
    rows = clean(100)
    for row in rows[:30]:
        row["rejected"] = row["rejected"].rstrip(".")
    assert found(rows) == {"one_side_cut_off": list(range(30))}
    for row in rows[30:60]:
        row["chosen"] = row["chosen"].rstrip(".")
    assert found(rows) == {}  # as often on the other side: nothing to be learnt


def test_answers_of_one_word_are_the_task_where_most_are() -> None:
    assert found([text_row(f"Question n{i}?", f"a{i}", f"b{i}") for i in range(20)]) == {}


def test_texts_say_how_many_and_which() -> None:
    (finding,) = check(clean() + clean(1)).findings
    assert finding.text == "1 row: the same pair as an earlier row"
    assert (finding.tally.count, finding.level) == (1, "warning")
    assert finding.tally.example.startswith("Tell me something about number n0")
    (finding,) = check([*clean(), text_row("p", "A \x1b[31mred.[/INST]", "C d.")]).findings
    assert "\x1b" not in finding.tally.example


def test_known_faults_of_the_public_pairs(shared: Path) -> None:
    rows, _ = load_rows(shared / "data/pairs_public.jsonl.gz")
    counts = {f.name: f.tally.count for f in check_texts(rows).findings}
    assert counts == {
        "near_duplicates": 43,
        "preference_cycles": 3,
        "chosen_and_rejected": 289,
        "one_word": 130,
        "repeats_prompt": 2,
        "role_marks": 32,
        "one_side_cut_off": 528,
        "almost_equal": 129,
    }
