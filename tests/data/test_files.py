"""CSV headers: which mark separates them, what stands before them, and a name twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from rmipo_lite.data.rows import load_rows


@pytest.mark.parametrize(
    ("header", "row"),
    [
        ('prompt;chosen;rejected;"a, b, c, d, e"', "q;yes, sure;no;1"),
        ("sep=;\r\nprompt;chosen;rejected", "q;yes, sure;no"),
        ("SEP=\t\nprompt\tchosen\trejected", "q\tyes, sure\tno"),
        ("\n \r\n\nprompt,chosen,rejected", 'q,"yes, sure",no'),
        ('"prompt"|"chosen"|"rejected"|"x;y;z,,,"', "q|yes, sure|no|1"),
        ("rejected,chosen,prompt,,", 'no,"yes, sure",q,,'),
    ],
)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_the_header_is_found(tmp_path: Path, header: str, row: str, mark: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(f"{mark}{header}\n{row}\n".encode())
    rows, report = load_rows(path)
    assert [(row.prompt, row.chosen, row.rejected) for row in rows] == [("q", "yes, sure", "no")]
    assert report.total == 1


def test_other_names_are_told_apart_too(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("question;good;bad\nq;yes;no\n")
    with pytest.raises(ValueError, match="columns found \\['question', 'good', 'bad'\\]"):
        load_rows(tmp_path / "a.csv")


def test_a_column_twice_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected,chosen\nq,yes,no,maybe\n")
    with pytest.raises(ValueError, match=r"a\.csv: column 'chosen' is there twice"):
        load_rows(tmp_path / "a.csv")


@pytest.mark.parametrize("content", ["", "\n\n", "sep=;\n"])
def test_a_file_without_a_header_has_no_rows(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(ValueError, match="no rows"):
        load_rows(tmp_path / "a.csv")
