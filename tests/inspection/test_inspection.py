"""`inspect` as a user calls it: what it finds, shows, keeps, and leaves as it was."""

from __future__ import annotations

import html
import io
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rmipo_lite
from rmipo_lite.data.rows import load_rows
from rmipo_lite.demo import MODEL, easy_rows as demo_rows
from rmipo_lite.demo.data import load_tokenizer, swapped as swap
from rmipo_lite.demo.facts import GENERIC
from rmipo_lite.inspection import inspection
from rmipo_lite.inspection.inspection import Inspection, inspect
from rmipo_lite.inspection.score_file import SCORES_FILE
from rmipo_lite.step.pair_step import PairStep
from tests.kit import tiny_model, word_rows, word_tokenizer

HOSTILE = "<script>alert(1)</script> \x1b[31m red [/INST] and so on and on as it goes"


def words(count: int = 40, **options: Any) -> Inspection:
    """The tiny model on rows of its own words."""
    given = {"tokenizer": word_tokenizer(), "use_cpu": True, **options}
    return inspect(word_rows(count), given.pop("model", tiny_model()), **given)


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


@pytest.fixture(scope="module")
def swapped() -> tuple[Inspection, set[int]]:
    """The demo's pairs, 5 % of them with their labels swapped, under the demo's model."""
    rows = demo_rows()
    wrong = set(random.Random(0).sample(range(len(rows)), len(rows) // 20))
    data = [swap(row) if number in wrong else row for number, row in enumerate(rows)]
    return inspect(data, MODEL, use_cpu=True), wrong


# ---- what it finds --------------------------------------------------------------------------


def test_swapped_labels_come_first(swapped: tuple[Inspection, set[int]]) -> None:
    found, wrong = swapped
    named = [pair.row for pair in found.suspicious(1000, "label")]
    assert set(named[:40]) <= wrong
    assert len(wrong & set(named)) >= 0.9 * len(wrong)
    assert len(named) <= 1.1 * len(wrong)


def test_unpaired_rows() -> None:
    rows = [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": number % 3 > 0}
        for number, row in enumerate(word_rows(30))
    ]
    found = inspect(rows, tiny_model(), tokenizer=word_tokenizer(), use_cpu=True, loss_type="kto")
    assert found.scores is not None
    assert found.metrics["loss"] == pytest.approx(0.5, abs=1e-6)  # its own reference
    own = found.to_pandas()
    places = {True: own.row % 3 > 0, False: own.row % 3 == 0}
    for side, label in (("chosen", True), ("rejected", False)):
        lengths = own[f"{side}_length"][places[label]]
        assert sorted(lengths) == sorted(found.lengths_of(side))
        mean = own[f"{side}_logps"][places[label]].mean()
        assert found.metrics[f"logps/{side}"] == pytest.approx(mean, rel=1e-5)
    text = str(found)
    assert "labels" in text
    assert "longer" not in text
    assert "gamma" not in text
    assert found._repr_html_()
    assert len(found.plot().axes) == 4


def test_generic_answers_that_win_come_first() -> None:
    rows = demo_rows()
    specific = [n for n, row in enumerate(rows) if row["rejected"][0]["content"] not in GENERIC]
    planted = set(random.Random(1).sample(specific, 40))
    for number in planted:
        row = rows[number]
        rows[number] = dict(row, chosen=answer("I am not sure."), rejected=row["chosen"])
    found = inspect(rows, MODEL, use_cpu=True)
    named = [pair.row for pair in found.suspicious(1000, "generic")]
    assert set(named[:36]) <= planted
    assert len(planted & set(named)) >= 36


def test_the_demo_is_quiet() -> None:
    found = inspect(demo_rows(), MODEL, use_cpu=True)
    assert {finding.name for finding in found.findings} == {"near_duplicates"}
    assert found.suspicious_counts["generic"] < 20
    assert found.suspicious_counts["label"] < 10
    assert found.metrics["rewards/accuracies"] > 0.98


@pytest.mark.slow
def test_metrics_are_what_training_evaluates_first(tmp_path: Path) -> None:
    rows = demo_rows()[:60]
    result = rmipo_lite.train(
        MODEL, rows, eval_dataset=rows, output_dir=tmp_path / "run", max_steps=1, use_cpu=True,
        eval_completions=0, sample_prompts=0, disable_tqdm=True,
    )  # fmt: skip
    found = inspect(rows, MODEL, use_cpu=True)
    for name in ("loss", "rewards/accuracies", "rewards/margins", "rmipo/gamma", "rmipo/pmi_gap"):
        assert found.metrics[name] == pytest.approx(result.metrics_before[f"eval_{name}"], abs=1e-4)


def test_without_a_model_lengths_are_in_words() -> None:
    found = inspect([{"prompt": "a b c", "chosen": "d e", "rejected": "f  g\nh i"}])
    assert found.unit == "words"
    assert found.to_pandas().to_dict("records") == [
        {"row": 0, "prompt_length": 3, "chosen_length": 2, "rejected_length": 4}
    ]
    assert "chosen, words" in str(found)
    assert found.metrics == {}


def test_a_tokenizer_alone_counts_tokens_as_scoring_does() -> None:
    rows = demo_rows()[:50]
    counted = inspect(rows, tokenizer=load_tokenizer(), max_length=256)
    scored = inspect(rows, MODEL, use_cpu=True)
    for name in ("prompt_length", "chosen_length", "rejected_length"):
        assert counted.columns[name].tolist() == scored.columns[name].tolist()
    assert (counted.unit, counted.scores) == ("tokens", None)
    assert str(counted.data_report) == str(scored.data_report)
    by_name = inspect(rows, tokenizer=str(MODEL), max_length=256)
    assert by_name.columns["chosen_length"].tolist() == counted.columns["chosen_length"].tolist()


@pytest.mark.parametrize("loss_type", ["simpo", "hinge", "simper"])
def test_other_losses_have_no_pmi(loss_type: str) -> None:
    found = words(loss_type=loss_type)
    frame = found.to_pandas()
    assert frame[["chosen_pmi", "rejected_pmi", "pmi_gap"]].isna().all(axis=None)
    assert frame[["loss", "weight", "chosen_logps"]].notna().all(axis=None)
    assert f"not computed: loss_type {loss_type} has no prior" in str(found)
    assert "PMI gap, nats" not in str(found)
    assert found.plot().axes[-1].get_title() == "Loss weight"


def test_pairs_that_are_dropped_or_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = PairStep.evaluate

    def broken(self: PairStep, pairs: Any) -> Any:
        for part, values in evaluate(self, pairs):
            values.chosen_logps[[pair.row == 4 for pair in part]] = torch.nan
            yield part, values

    monkeypatch.setattr(PairStep, "evaluate", broken)
    rows = word_rows(12)
    rows[2]["chosen"] = "</s>"
    found = inspect(rows, tiny_model(), tokenizer=word_tokenizer(), use_cpu=True)
    frame = found.to_pandas()
    assert sorted(set(range(12)) - set(frame.row)) == [2]
    assert frame[frame.chosen_logps.isna()].row.tolist() == [4]
    assert found.metrics["rmipo/dropped_pairs"] == 1
    shown = str(found)
    assert "1, left out of every number (rows 4)" in shown
    assert "control or unknown tokens alone" in " ".join(shown.split())
    assert "nan" not in shown.lower()


def test_undefined_pmi_is_counted() -> None:
    rows = word_rows(12)
    rows[3] |= {"prompt": "w3 w4", "chosen": "</s>w5", "rejected": "w6 w7"}
    found = inspect(
        [*rows, {"prompt": "w3", "chosen": "w5</s>", "rejected": "w6 w7"}],
        tiny_model(), tokenizer=word_tokenizer(), use_cpu=True, max_length=4,
    )  # fmt: skip
    frame = found.to_pandas()
    undefined = frame[frame.pmi_gap.isna()]
    assert len(undefined) == round(found.metrics["rmipo/pmi_undefined"] * len(frame))
    assert undefined.gamma.tolist() == [np.float32(1.6)] * len(undefined)
    assert ("PMI undefined" in str(found)) == (len(undefined) > 0)


# ---- how it is shown ------------------------------------------------------------------------


def test_text_fits_a_terminal(swapped: tuple[Inspection, set[int]]) -> None:
    found, _ = swapped
    for shown in (str(found), found.text(10), found.text(0)):
        assert max(map(len, shown.splitlines())) <= 100
    assert "Suspicious" not in found.text(0)
    assert found.text(10).count("\n  row ") == 20
    assert "1600 in = 1600 kept" in str(found)
    assert "Under tiny-llama" in str(found)


def test_texts_of_data_are_harmless(tmp_path: Path) -> None:
    found = inspect([{"prompt": HOSTILE, "chosen": HOSTILE + " a", "rejected": HOSTILE + " b"}])
    page = found.report(tmp_path / "page.html").read_text(encoding="utf-8")
    for shown in (page, found._repr_html_()):
        assert "<script" not in shown
        assert html.escape("<script>alert(1)</script>") in shown.replace("<wbr>", "")
        assert "\x1b" not in shown
    assert "\x1b" not in str(found)


def test_the_page_holds_everything(swapped: tuple[Inspection, set[int]], tmp_path: Path) -> None:
    found, _ = swapped
    page = found.report(tmp_path / "new" / "page.html", top=4).read_text(encoding="utf-8")
    for finding in found.findings:
        assert html.escape(finding.text) in page
    for pair in found.suspicious(4):
        assert html.escape(pair.chosen) in page
    assert page.count("<svg") == 6
    assert "gamma_scaled_by_beta" in page.replace("<wbr>", "")
    assert not re.search(r"<(script|link|img)|src=|url\(http", page)
    assert re.search(r"\bnan\b", page.lower()) is None


def test_the_figure(swapped: tuple[Inspection, set[int]]) -> None:
    found, _ = swapped
    axes = found.plot().axes
    assert [a.get_title() for a in axes] == [
        "Response length", "Prompt length", "Log-prob gap", "PMI gap", "Gamma", "Loss weight",
    ]  # fmt: skip
    for panel in axes[1:]:  # every pair stands in a bin, what lies outside in the outermost
        (stairs,) = panel.patches
        assert stairs.get_data().values.sum() == 1600
    buffer = io.BytesIO()
    found.plot().savefig(buffer)
    assert buffer.getvalue().startswith(b"\x89PNG")


def test_the_smallest_dataset_is_shown() -> None:
    found = words(1)
    assert str(found)
    assert found._repr_html_()
    assert len(found.plot().axes) == 6


def test_suspicious_takes_a_number_and_a_kind(swapped: tuple[Inspection, set[int]]) -> None:
    found, _ = swapped
    assert [pair.kind for pair in found.suspicious(2)] == ["label"] * 2 + ["generic"] * 2
    assert found.suspicious(0) == []
    assert {pair.kind for pair in found.suspicious(5, "generic")} == {"generic"}
    with pytest.raises(ValueError, match="wanted one of label, generic, almost_equal, got 'odd'"):
        found.suspicious(kind="odd")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got -1"):
        found.suspicious(-1)


# ---- what it keeps --------------------------------------------------------------------------


def test_the_same_call_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(inspection, "ROWS_PER_CHUNK", 8)
    options: dict[str, Any] = {"max_tokens_per_microstep": 60}
    whole = words(**options)
    evaluate, left = PairStep.evaluate, [6]

    def interrupted(self: PairStep, pairs: Any) -> Any:
        for found in evaluate(self, pairs):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            yield found

    with monkeypatch.context() as patched:
        patched.setattr(PairStep, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            words(output_dir=tmp_path, **options)
    path = tmp_path / SCORES_FILE
    assert f"what is scored is in {path}; the same call goes on there" in capsys.readouterr().out
    kept = len(path.read_text().splitlines()) - 1
    assert 0 < kept < 40
    again = words(output_dir=tmp_path, **options)
    said = capsys.readouterr().out
    assert f"{kept} scored pairs are taken over from {tmp_path}" in said
    assert f"40, {kept} of them by an earlier call" in str(again)
    assert again.to_pandas().equals(whole.to_pandas())
    assert [p.name for p in tmp_path.iterdir()] == [SCORES_FILE]


def test_ctrl_c_without_a_folder_says_how_to_keep(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(self: PairStep, pairs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(PairStep, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        words()
    assert "nothing is kept; with output_dir=" in capsys.readouterr().out


def test_another_inspection_in_the_folder_is_an_error(tmp_path: Path) -> None:
    words(output_dir=tmp_path)
    with pytest.raises(ValueError, match=r"other options \({\"beta\": 2.0} there, .*name another"):
        words(output_dir=tmp_path, beta=3.0)
    with pytest.raises(ValueError, match="scores of other model "):
        words(output_dir=tmp_path, model=tiny_model(hidden_size=64))
    with pytest.raises(ValueError, match="scores of other dataset "):
        words(39, output_dir=tmp_path)


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("training", [True, False])
def test_the_model_stays_as_it_was(training: bool) -> None:
    model = tiny_model(attention_dropout=0.1).train(training)
    model.config.use_cache = True
    before = {name: value.clone() for name, value in model.state_dict().items()}
    grads = {name: p.requires_grad for name, p in model.named_parameters()}
    drawn = torch.get_rng_state()
    words(model=model)
    assert model.training == training
    assert model.config.use_cache
    assert {name: p.requires_grad for name, p in model.named_parameters()} == grads
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not hasattr(model, "peft_config")


def test_dropout_has_no_part_in_the_scores() -> None:
    model = tiny_model(attention_dropout=0.5)
    numbers = words(model=model).to_pandas()
    assert words(model=model.train()).to_pandas().equals(numbers)


def test_memory_is_that_of_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more pairs of ids than a chunk has rows."""
    monkeypatch.setattr(inspection, "ROWS_PER_CHUNK", 8)
    sizes: list[int] = []
    evaluate = PairStep.evaluate

    def watched(self: PairStep, pairs: Any) -> Any:
        sizes.append(len(pairs))
        return evaluate(self, pairs)

    monkeypatch.setattr(PairStep, "evaluate", watched)
    words(30)
    assert sizes == [8, 8, 8, 6]


# ---- wrong calls ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": 3}, TypeError, "model: wanted a name or folder"),
        ({"model": torch.nn.Linear(2, 2)}, TypeError, "model: wanted a name or folder"),
        ({"model": "absent/folder/here"}, (ValueError, FileNotFoundError), "absent/folder/here"),
        ({"bta": 1.0}, TypeError, "no option 'bta'"),
        ({"beta": -1.0}, ValueError, "beta must be"),
        ({"tokenizer": 3}, TypeError, "tokenizer: wanted a tokenizer"),
        ({"tokenizer": None}, ValueError, "names no folder to load a tokenizer"),
        ({"loss_type": "nope"}, ValueError, "loss_type must be"),
        ({"output_dir": __file__}, ValueError, "output_dir: wanted a folder"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        words(**options)


def test_weights_and_vocabulary_that_cannot_be_right() -> None:
    broken = tiny_model()
    with torch.no_grad():
        next(broken.parameters())[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="holds NaN"):
        words(model=broken)
    with pytest.raises(ValueError, match="use the model's own tokenizer"):
        words(model=tiny_model(vocab_size=40))


@pytest.mark.slow
def test_real_pairs_under_a_real_model(shared: Path) -> None:
    rows, _ = load_rows(shared / "data/pairs_public_text.jsonl.gz")
    data = [{n: getattr(r, n) for n in ("prompt", "chosen", "rejected")} for r in rows[:300]]
    found = inspect(data, shared / "models/stories260K", use_cpu=True)
    frame = found.to_pandas()
    assert len(frame) == found.data_report.kept
    assert np.isfinite(frame[["chosen_logps", "rejected_logps", "loss", "weight"]]).all(axis=None)
    assert frame.weight.between(0, 1).all()
