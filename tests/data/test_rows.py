"""Reading datasets: every kind of input, every shape, and every row accounted for."""

from __future__ import annotations

import gzip
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest

from rmipo_lite.data import files, normalise
from rmipo_lite.data.report import DataReport
from rmipo_lite.data.rows import Row, load_rows

ROWS = [
    {"prompt": f"Question {i}?", "chosen": f"Good {i}.", "rejected": f"Bad {i}."} for i in range(5)
]
USER = {"role": "user", "content": "Hi"}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def texts(rows: list[Row]) -> list[tuple[Any, Any, Any]]:
    return [(row.prompt, row.chosen, row.rejected) for row in rows]


def write_lines(path: Path, lines: list[bytes]) -> Path:
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def lines_of(rows: list[dict[str, Any]]) -> list[bytes]:
    return [json.dumps(row).encode() for row in rows]


# ---- every kind of input gives the same rows ------------------------------------------------


def _jsonl(folder: Path) -> Any:
    return write_lines(folder / "a.jsonl", lines_of(ROWS))


def _jsonl_gz(folder: Path) -> Any:
    path = folder / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"\n".join(lines_of(ROWS))))
    return str(path)


def _json_list(folder: Path) -> Any:
    (folder / "a.json").write_text(json.dumps(ROWS, indent=1))
    return folder / "a.json"


def _json_columns(folder: Path) -> Any:
    (folder / "a.json").write_text(json.dumps(_columns(folder)))
    return folder / "a.json"


def _json_lines_named_json(folder: Path) -> Any:
    return write_lines(folder / "a.json", lines_of(ROWS))


def _bom_crlf_blank(folder: Path) -> Any:
    (folder / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n".join(lines_of(ROWS)))
    return folder / "a.jsonl"


def _csv(folder: Path) -> Any:
    datasets.Dataset.from_list(ROWS).to_pandas().to_csv(folder / "a.csv", index=False)
    return folder / "a.csv"


def _parquet(folder: Path) -> Any:
    datasets.Dataset.from_list(ROWS).to_pandas().to_parquet(folder / "a.parquet")
    return folder / "a.parquet"


def _saved(folder: Path) -> Any:
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "saved")
    return folder / "saved"


def _saved_dict(folder: Path) -> Any:
    datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)).save_to_disk(folder / "saved")
    return folder / "saved"


def _folder_of_files(folder: Path) -> Any:
    write_lines(folder / "test.jsonl", lines_of(ROWS[:1]))
    write_lines(folder / "train-0.jsonl", lines_of(ROWS[:2]))
    write_lines(folder / "train-1.jsonl", lines_of(ROWS[2:]))
    return folder


def _columns(_: Path) -> Any:
    return {name: [row[name] for row in ROWS] for name in ROWS[0]}


KINDS: dict[str, Callable[[Path], Any]] = {
    "jsonl": _jsonl,
    "jsonl.gz": _jsonl_gz,
    "json list": _json_list,
    "json columns": _json_columns,
    "lines named json": _json_lines_named_json,
    "bom, crlf, blank lines": _bom_crlf_blank,
    "csv": _csv,
    "parquet": _parquet,
    "saved Dataset": _saved,
    "saved DatasetDict": _saved_dict,
    "folder of files": _folder_of_files,
    "dict of lists": _columns,
    "list": lambda _: ROWS,
    "generator": lambda _: (row for row in ROWS),
    "Dataset": lambda _: datasets.Dataset.from_list(ROWS),
    "DatasetDict": lambda _: datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)),
    "one split of another name": lambda _: datasets.DatasetDict(
        train_prefs=datasets.Dataset.from_list(ROWS)
    ),
    "IterableDataset": lambda _: datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
    "pandas": lambda _: datasets.Dataset.from_list(ROWS).to_pandas(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_rows(kind: str, tmp_path: Path) -> None:
    rows, report = load_rows(KINDS[kind](tmp_path))
    assert texts(rows) == [tuple(row.values()) for row in ROWS]
    assert [row.index for row in rows] == list(range(5))
    assert (report.total, report.kept) == (5, 5)


def test_messages_survive_parquet_and_pandas(tmp_path: Path) -> None:
    frame = datasets.Dataset.from_list(
        [{"prompt": [USER], "chosen": [assistant("a")], "rejected": [assistant("b")]}]
    ).to_pandas()
    frame.to_parquet(tmp_path / "a.parquet")
    expected = [([USER], [assistant("a")], [assistant("b")])]
    assert texts(load_rows(frame)[0]) == expected
    assert texts(load_rows(tmp_path / "a.parquet")[0]) == expected


def test_hub_name_goes_to_load_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str) -> Any:
        asked.append(name)
        return datasets.DatasetDict(
            test=datasets.Dataset.from_list(ROWS[:2]), train=datasets.Dataset.from_list(ROWS)
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load_rows("owner/pairs")[0]) == 5
    assert len(load_rows("owner/pairs", split="test")[0]) == 2
    assert asked == ["owner/pairs"] * 2


def test_hub_failure_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str) -> Any:
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"'owner/pairs' is neither a file.*offline"):
        load_rows("owner/pairs")


# ---- shapes ---------------------------------------------------------------------------------

CONVERSATION = ([USER], [assistant("good")], [assistant("bad")])


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": [USER], "chosen": [assistant("good")], "rejected": [assistant("bad")]},
        {"chosen": [USER, assistant("good")], "rejected": [USER, assistant("bad")]},
        {
            "prompt": "Hi",
            "chosen": [USER, assistant("good")],
            "rejected": [USER, assistant("bad")],
        },
        {
            "prompt": [USER],
            "chosen": [USER, assistant("good")],
            "rejected": [USER, assistant("bad")],
        },
        {"prompt": "Hi", "chosen": [assistant("good")], "rejected": [assistant("bad")]},
        {"prompt": [USER], "chosen": "good", "rejected": "bad"},
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: good",
            "rejected": "\n\nHuman: Hi\n\nAssistant: bad",
        },
        {
            "prompt": [{"role": "user", "content": [{"type": "text", "text": "Hi"}], "name": None}],
            "chosen": [assistant("good")],
            "rejected": [assistant("bad")],
        },
    ],
)
def test_all_conversation_shapes_mean_the_same(record: dict[str, Any]) -> None:
    assert texts(load_rows([record])[0]) == [CONVERSATION]


def test_prompt_that_looks_like_a_transcript_stays_text() -> None:
    record = {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " a", "rejected": " b"}
    assert texts(load_rows([record])[0]) == [tuple(record.values())]


REFUSED: dict[str, tuple[Any, str]] = {
    "none": ({"chosen": None}, "chosen: wanted .*, got None$"),
    "integer": ({"prompt": 3}, r"prompt: wanted .*, got a number \(int\)"),
    "nan": ({"rejected": math.nan}, "rejected: wanted .*, got NaN"),
    "true": ({"rejected": True}, "rejected: .* got a truth value"),
    "bytes": ({"prompt": b"x"}, "prompt: .* got a value of type bytes"),
    "dict": ({"prompt": {"a": "b"}}, "prompt: .* got a value of type dict"),
    "list of texts": (
        {"chosen": ["a"], "rejected": ["b"]},
        "chosen: .* got a list of a value of type str",
    ),
    "kinds differ": (
        {"chosen": [assistant("a")]},
        "chosen and rejected: wanted two texts or two message lists",
    ),
    "surrogate": ({"chosen": "a\ud800"}, "chosen: wanted text, got a lone surrogate"),
    "no role": (
        {"chosen": [{"from": "gpt", "value": "a"}], "rejected": [assistant("b")]},
        "chosen: wanted messages .*, got no role",
    ),
    "no content": (
        {"chosen": [{"role": "assistant", "content": None}], "rejected": [assistant("b")]},
        "got a message whose content is None",
    ),
    "tools": ({"tools": [{"name": "f"}]}, "tools: wanted nothing"),
    "tool calls": (
        {
            "chosen": [{**assistant("a"), "tool_calls": np.array([1, 2])}],
            "rejected": [assistant("b")],
        },
        "chosen: .* got tool calls",
    ),
    "nan of numpy": ({"rejected": np.float32("nan")}, "rejected: .* got NaN"),
    "missing of pandas": ({"prompt": pd.NA}, "prompt: .* got NaN"),
    "tensor-like": ({"chosen": np.array([1, 2])}, "got a list of a number"),
    "user answers": (
        {"chosen": [USER], "rejected": [assistant("b")]},
        "chosen: wanted one assistant message as its last turn",
    ),
    "prefilled": (
        {"prompt": [assistant("x")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
        "prompt: wanted a user message last",
    ),
    "disagree": (
        {"chosen": [USER, assistant("a")], "rejected": [USER, assistant("b")]},
        "prompt: wanted the prompt that the conversations",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_faulty_row_is_refused_and_the_rest_goes_on(name: str) -> None:
    change, reason = REFUSED[name]
    rows, report = load_rows([ROWS[0], {**ROWS[1], **change}, ROWS[2]])
    assert [row.index for row in rows] == [0, 2]
    ((told, tally),) = report.refused.items()
    assert tally.rows == [1]
    assert re.search(reason, told)
    report.check()


def test_rows_of_other_types_and_missing_keys_are_refused() -> None:
    rows, report = load_rows([ROWS[0], None, [1], {"prompt": "a", "chosen": "b"}])
    assert len(rows) == 1
    assert report.refused_count == 3
    wanted = "text or a message list, got nothing (the row has no such key)"
    assert report.refused[f"rejected: wanted {wanted}"].example == "keys prompt, chosen"


def test_prompts_that_differ_inside_conversations_are_refused() -> None:
    other = {"role": "user", "content": "Hello"}
    good = {"chosen": [USER, assistant("a")], "rejected": [USER, assistant("b")]}
    bad = {"chosen": [USER, assistant("a")], "rejected": [other, assistant("b")]}
    ((reason, tally),) = load_rows([good, bad])[1].refused.items()
    assert reason.startswith("chosen and rejected: wanted conversations that differ in the last")
    assert tally.example == "2 and 2 turns, the first difference in turn 0"


def test_drops() -> None:
    rows, report = load_rows(
        [
            ROWS[0],
            {**ROWS[1], "chosen": ""},
            {**ROWS[1], "rejected": " \n"},
            {"prompt": "p", "chosen": "x", "rejected": "x"},
        ]
    )
    assert len(rows) == 1
    assert {reason: tally.rows for reason, tally in report.dropped.items()} == {
        "chosen: wanted a response, got an empty or blank one": [1],
        "rejected: wanted a response, got an empty or blank one": [2],
        "chosen and rejected: wanted two different responses, got identical ones": [3],
    }
    assert report.identical_pairs == 1


def test_duplicates_and_repeated_prompts_are_counted_and_kept() -> None:
    prompt = "A prompt of more than twenty characters."
    echo = {"prompt": prompt, "chosen": prompt + " yes", "rejected": prompt + " no"}
    _, report = load_rows([ROWS[0], ROWS[0], echo])
    assert (report.kept, report.duplicate_rows, report.responses_repeating_prompt) == (3, 1, 1)


def test_an_empty_tools_column_is_none_at_all() -> None:
    rows, _ = load_rows([{**ROWS[0], "tools": nothing} for nothing in (None, pd.NA, math.nan, [])])
    assert len(rows) == 4


def test_texts_of_numpy_become_plain_texts() -> None:
    record = {name: np.str_(text) for name, text in ROWS[0].items()}
    ((row,), _) = load_rows([record, {**record, "prompt": np.array("Hi")}][:1])
    assert type(row.prompt) is str
    assert load_rows([{**record, "prompt": np.array("Hi")}])[0][0].prompt == "Hi"


# ---- the dataset as a whole -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "rename"),
    [
        (
            ("question", "good", "bad"),
            '{"question": "prompt", "good": "chosen", "bad": "rejected"}',
        ),
        (("instruction", "response_j", "response_k"), '"response_j": "chosen"'),
        (("Prompt", "chosen", "rejected"), '{"Prompt": "prompt"}'),
        (("input", "chosen", "rejected"), '{"input": "prompt"}'),
        (("prompt", "chosen_response", "rejected_response"), '"rejected_response": "rejected"'),
        (("prompt", "winner", "loser"), '"winner": "chosen", "loser": "rejected"'),
        (("prompt", "choosen", "rejected"), '{"choosen": "chosen"}'),
        (("x", "yw", "yl"), '{"x": "prompt", "yw": "chosen", "yl": "rejected"}'),
        (
            ("prompt", "incorrect_answer", "correct_answer"),
            '{"correct_answer": "chosen", "incorrect_answer": "rejected"}',
        ),
        (
            ("prompt", "non_preferred", "preferred"),
            '{"preferred": "chosen", "non_preferred": "rejected"}',
        ),
        (("userPrompt", "goodAnswer", "badAnswer"), '"goodAnswer": "chosen", "badAnswer"'),
    ],
)
def test_wrong_columns_name_the_rename(names: tuple[str, ...], rename: str) -> None:
    dataset = datasets.Dataset.from_list([dict(zip(names, "abc", strict=True))])
    with pytest.raises(ValueError, match="columns found") as caught:
        load_rows(dataset)
    assert rename in str(caught.value)
    assert all(name in str(caught.value) for name in names)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([], "no rows"),
        (7, "wanted a hub name"),
        ({"prompt": ["a"], "chosen": ["b", "c"], "rejected": ["d"]}, "unequal length"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "lists of equal length"),
        ([{"chosen": "a", "rejected": "b"}], "missing \\['prompt'\\]"),
        (
            [{**ROWS[0], "chosen": None}] * 3,
            r"3 rows \(0, 1, 2\): chosen: wanted text or a message list, got None",
        ),
        ([None, None], "no usable row among the 2"),
        ([{f"column {i}": "a" for i in range(1000)}], r"'column 19', \.\.\. \(1000 in all\)"),
        (datasets.DatasetDict(a=datasets.Dataset.from_list(ROWS), b=None), r"such as split='a'"),
    ],
)
def test_structural_trouble_is_a_value_error(dataset: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_rows(dataset)


def test_errors_name_the_argument(tmp_path: Path) -> None:
    for dataset in ([], [{"a": "b"}], tmp_path / "a.jsonl", [{**ROWS[0], "chosen": 3}]):
        with pytest.raises((ValueError, FileNotFoundError), match=r"^eval_dataset: "):
            load_rows(dataset, argument="eval_dataset")


def test_missing_file_and_unknown_ending(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        load_rows(tmp_path / "a.jsonl")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=r"ends in '\.txt'"):
        load_rows(tmp_path / "a.txt")
    with pytest.raises(ValueError, match="holds no saved dataset"):
        load_rows(tmp_path)


# ---- hostile files --------------------------------------------------------------------------

LINE = "row: wanted a line that holds one JSON object"


def test_broken_lines_cost_themselves_alone(tmp_path: Path) -> None:
    good = lines_of(ROWS[:1])[0]
    nested = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    twice = b'{"prompt":"a","prompt":"b","chosen":"c","rejected":"d"}'
    path = write_lines(
        tmp_path / "a.jsonl", [good, b'{"prompt": ', b'{"a": "\xff"}', nested, twice, good]
    )
    rows, report = load_rows(path)
    assert [row.index for row in rows] == [0, 5]
    assert {reason: tally.example[:6] for reason, tally in report.refused.items()} == {
        f"{LINE}, got one that is not JSON": "line 2",
        f"{LINE}, got one that is not UTF-8": "line 3",
        f"{LINE}, got one nested too deep": "line 4",
        f"{LINE}, got one with a key twice": "line 5",
    }


def test_a_line_over_the_limit_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 1000)
    good = lines_of(ROWS[:1])[0]
    rows, report = load_rows(write_lines(tmp_path / "a.jsonl", [good, b"x" * 5000, good]))
    assert [row.index for row in rows] == [0, 2]
    assert report.refused[f"{LINE}, got one longer than 1000 bytes"].example == "line 2"


def test_a_document_in_one_long_line_is_no_long_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 100)
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    assert len(load_rows(tmp_path / "a.json")[0]) == 5
    monkeypatch.setattr(files, "MAX_FILE_BYTES", 100)
    with pytest.raises(ValueError, match="more than 100 bytes; split it"):
        load_rows(tmp_path / "a.json")


def test_a_list_in_the_first_line_costs_that_line_alone(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [b'["x"]', *lines_of(ROWS)])
    assert [row.index for row in load_rows(path)[0]] == [1, 2, 3, 4, 5]
    table = json.dumps({"prompt": ["p"], "chosen": ["a"], "rejected": ["b"]}).encode()
    path = write_lines(tmp_path / "b.jsonl", [table, *lines_of(ROWS)])
    assert [row.index for row in load_rows(path)[0]] == [1, 2, 3, 4, 5]


def test_a_key_twice_in_a_document_costs_that_row_alone(tmp_path: Path) -> None:
    twice = '{"prompt":"a","prompt":"b","chosen":"c","rejected":"d"}'
    (tmp_path / "a.json").write_text(f"[{json.dumps(ROWS[0])},{twice}]")
    rows, report = load_rows(tmp_path / "a.json")
    assert [row.index for row in rows] == [0]
    assert list(report.refused) == ["row: wanted a JSON object, got one with a key twice"]


def test_a_csv_row_with_an_unquoted_comma_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected\na,b,c\na,yes, or no,c\n")
    rows, report = load_rows(tmp_path / "a.csv")
    assert [row.index for row in rows] == [0]
    ((reason, tally),) = report.refused.items()
    assert reason == "row: wanted 3 cells, as many as the header, got more"
    assert tally.example == "row 1 has 4: a comma outside quotes?"


def test_a_csv_line_over_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 100)
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected\n" + "a" * 1000)
    with pytest.raises(ValueError, match="a line longer than 100 characters"):
        load_rows(tmp_path / "a.csv")


def test_parquet_that_expands_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_FILE_BYTES", 10_000)
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_list([{**ROWS[0], "chosen": "x" * 500}] * 3000).to_parquet(path)
    monkeypatch.setattr(files, "MAX_FILE_BYTES", path.stat().st_size)
    with pytest.raises(ValueError, match="expands to more than"):
        load_rows(path)


@pytest.mark.parametrize(
    "name", ["a\0b", "x" * 5000, '{"prompt": "a"}\n', "~no-such-user/a", "\ud800"]
)
def test_what_no_file_can_be_called(name: str) -> None:
    with pytest.raises((FileNotFoundError, ValueError), match="dataset: "):
        load_rows(name)


def test_a_saved_dataset_names_no_files_outside(tmp_path: Path) -> None:
    folder = _saved_dict(tmp_path)
    state = folder / "train" / "state.json"
    state.write_text(state.read_text().replace("data-00000", "../../data-00000"))
    with pytest.raises(ValueError, match="wanted a name inside the folder"):
        load_rows(folder)


def test_columns_that_can_be_read_once(tmp_path: Path) -> None:
    rows, _ = load_rows({name: iter([row[name] for row in ROWS]) for name in ROWS[0]})
    assert len(rows) == 5


def test_gzip_bomb_and_cut_gzip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "GZIP_FREE_BYTES", 10_000)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"0" * 10_000_000))
    with pytest.raises(ValueError, match="expands to more than 200 times"):
        load_rows(path)
    path.write_bytes(gzip.compress(b"\n".join(lines_of(ROWS)))[:-20])
    with pytest.raises(ValueError, match="can't be read"):
        load_rows(path)


def test_bad_bytes_in_csv_and_utf16(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"prompt,chosen,rejected\na,b,c\na,\xff,c\na,b\n")
    rows, report = load_rows(path)
    assert len(rows) == 1
    assert report.refused_count == 2
    path.write_bytes("prompt".encode("utf-16"))
    with pytest.raises(ValueError, match="UTF-16"):
        load_rows(path)


def test_damaged_parquet(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match="not a readable parquet"):
        load_rows(tmp_path / "a.parquet")


# ---- report ---------------------------------------------------------------------------------


def test_report_is_readable_json_able_and_escaped() -> None:
    report = DataReport(source="<b>x</b>\x1b[31m", total=9, kept=4, chosen_longer_pairs=4)
    report.refuse(1, "a reason", "<script>\x07")
    for row in range(2, 6):
        report.refuse(row, "a reason")
    report.set_lengths(prompt=[1, 2, 3], chosen=list(range(101)), rejected=[7])
    report.check()
    text = str(report)
    assert "9 in = 4 kept + 0 dropped + 5 refused" in text
    assert "p5 5  p50 50  p95 95  max 100" in text
    assert "MOST ROWS ARE REFUSED" in text
    assert "longer in 100%" in text
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "<script>" not in report._repr_html_()
    assert "&lt;b&gt;" in report._repr_html_()
    assert json.loads(json.dumps(report.to_dict()))["refused"]["a reason"]["rows"] == [
        1,
        2,
        3,
        4,
        5,
    ]


def test_every_row_is_named_and_the_line_stays_short() -> None:
    faulty = {**ROWS[0], "chosen": None}
    _, report = load_rows(ROWS + [faulty] * 100 + ROWS + [faulty])
    ((reason, tally),) = report.refused.items()
    assert tally.rows == [*range(5, 105), 110]
    assert tally.ranges == [(5, 104), (110, 110)]
    assert report.to_dict()["refused"][reason]["rows"] == tally.rows
    assert f"101: {reason} (rows 5, 6, 7, 8, 9, ...)" in str(report)


def test_check_finds_a_lost_row() -> None:
    with pytest.raises(AssertionError, match="is not the input"):
        DataReport(total=3, kept=2).check()


# ---- held-out pairs -------------------------------------------------------------------------


def test_transcripts_of_several_turns() -> None:
    text = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: "
    prompt, chosen, _ = normalise.normalise({"chosen": text + "d", "rejected": text + "e"})
    assert [message["role"] for message in prompt] == ["user", "assistant", "user"]
    assert chosen == [assistant("d")]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("pairs_public.jsonl.gz", 5776),
        ("pairs_public_text.jsonl.gz", 2722),
        ("hh_raw_implicit_prompt.jsonl.gz", 500),
    ],
)
def test_real_files_are_kept_whole(shared: Path, name: str, count: int) -> None:
    rows, report = load_rows(shared / "data" / name)
    assert len(rows) == report.total == count
