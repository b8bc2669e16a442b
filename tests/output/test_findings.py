from __future__ import annotations

from rmipo_lite.output.findings import Finding, Findings

_LONG = Finding("a", "the loss <b>rose</b> from 0.1 to 0.9\x1b[31m", "Lower it", steps=(20, 90))
_NOTE = Finding("b", "both fall", "That is normal", level="note")


def test_as_text() -> None:
    assert str(_NOTE) == "Note (before training): both fall. That is normal."
    text = str(Findings([_LONG, _NOTE]))
    assert "(steps 20 to 90): the loss <b>rose</b> from 0.1 to 0.9\\x1b[31m" in text
    assert max(map(len, text.splitlines())) <= 96
    assert str(Findings()).startswith("Findings: none")


def test_a_single_step_is_named_once() -> None:
    assert Finding("a", "x", "y", steps=(7, 7)).when == "step 7"


def test_as_html_every_text_is_escaped() -> None:
    page = Findings([_LONG, _NOTE])._repr_html_()
    assert "<b>" not in page
    assert "&lt;b&gt;rose" in page
    assert "\x1b" not in page
    assert page.count("<tr>") == 3
    assert "none" in Findings()._repr_html_()
