"""The benchmark of whole steps on a GPU: equal work, and no case that isn't what it says."""

from __future__ import annotations

import pytest
import torch

from benchmarks import gpu_models, gpu_step
from benchmarks.gpu_step import REHEARSAL, TRL, Case, Measured
from benchmarks.inputs import Lengths
from benchmarks.records import Record
from rmipo_lite.ops import native
from rmipo_lite.ops.library import BackendStatus
from rmipo_lite.step.pair_step import PairStep

TINY = Lengths(5, 7, 6)


def bench(monkeypatch: pytest.MonkeyPatch, **answers: Measured | Exception) -> list[Record]:
    """Rows of a rehearsal whose children answer this, by contender; ends with the error's text."""

    def child(case: Case, limit_s: float) -> list[Measured]:
        answer = answers.get(case.impl.replace(" ", "_"), Measured([2.0], 4, "packed, 9 tokens"))
        if isinstance(answer, Exception):
            raise answer
        return [answer]

    monkeypatch.setattr(gpu_step, "_in_child", child)
    rows: list[Record] = []
    try:
        rows.extend(gpu_step.bench(rehearse=True))  # extend keeps what came before an error
    except RuntimeError as error:
        rows.append(Record("error", "", "", "", "", "", str(error)))
    return rows


def test_both_losses_are_set_beside_trls(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = bench(monkeypatch, ours=Measured([8.0], 4, ""), trl_SimPO=Measured([4.0], 8, "1 pairs"))
    speeds = {row.impl: row.value for row in rows if row.metric == "pairs per second over trl's"}
    assert speeds == {"ours": 0.5, "ours simpo": 2.0}
    assert rows[-1].op == "gpu step"


def test_a_padded_run_of_ours_fails_after_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    padded = Measured([2.0], 4, "padded, 9 tokens", padded=True)
    rows = bench(monkeypatch, ours=padded)
    assert {row.impl for row in rows[:-1]} == {case.impl for case in REHEARSAL}
    assert "rehearsal 5/7/6, padded, 9 tokens" in {row.shape for row in rows}
    assert "ours on rehearsal 5/7/6 ran padded" in str(rows[-1].value)


@pytest.mark.parametrize("impl", ["ours", "ours simpo"])
def test_a_case_of_ours_that_fails_fails_all(monkeypatch: pytest.MonkeyPatch, impl: str) -> None:
    rows = bench(monkeypatch, **{impl.replace(" ", "_"): RuntimeError("no kernels")})
    assert next(row.value for row in rows if row.impl == impl) == "absent: no kernels"
    assert rows[-1].op == "error"
    assert "no kernels" in str(rows[-1].value)


def test_that_trl_fails_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = bench(monkeypatch, trl_SimPO=RuntimeError("no datasets"))
    assert "absent: no datasets" in {row.value for row in rows}
    assert all(row.op == "gpu step" for row in rows)


def test_no_case_is_begun_without_time() -> None:
    rows = list(gpu_step.bench(rehearse=True, seconds=1.0))
    assert {row.value for row in rows} == {"absent: no time left"}


@pytest.mark.parametrize(("impl", "has_prior"), [("ours", True), ("ours simpo", False)])
def test_ours_simpo_does_trls_work(
    monkeypatch: pytest.MonkeyPatch, impl: str, has_prior: bool
) -> None:
    """No prior pass; and the kernels are asked for, not whatever is there."""
    seen: list[PairStep] = []
    train = PairStep.train

    def watched(self: PairStep, *args: object) -> object:
        seen.append(self)
        return train(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(PairStep, "train", watched)
    (measured,) = gpu_step._measure(impl, "rehearsal", [TINY], None)
    assert isinstance(measured, Measured)
    assert measured.note.startswith("packed, ")
    assert not measured.padded
    assert seen[0].args.kernel_impl == "native"
    assert seen[0].args.uses_prior is has_prior


def test_without_kernels_nothing_passes_for_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = BackendStatus(False, None, None, "no compiler")
    monkeypatch.setattr(native, "status", lambda device_type: missing)
    with pytest.raises(RuntimeError, match="extension for cpu is missing: no compiler"):
        gpu_step._measure("ours", "rehearsal", [TINY], None)


def test_a_head_of_its_own_has_flat_logits() -> None:
    """So that rounding noise can't switch packing off on a card."""
    shape = gpu_models.SHAPES["rehearsal"]
    options = {**shape.options, "tie_word_embeddings": False}
    untied = gpu_models.ModelShape(shape.config, options, quantized=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(gpu_models.SHAPES, "untied", untied)
        model = gpu_models.random_model("untied", torch.device("cpu"))
    stds = [model.lm_head.weight.std(), model.model.embed_tokens.weight.std()]  # type: ignore[union-attr]
    assert [round(float(std), 3) for std in stds] == [0.005, 0.02]


def test_the_8b_cases_come_first_and_in_threes() -> None:
    """The time may not be enough for all: each comparison whole before the next."""
    whole = [(case.impl, case.model) for case in gpu_step.CASES if case.card is None]
    for model in ("Llama-3-8B", "Qwen2.5-0.5B", "Qwen2.5-3B"):
        assert {("ours", model), (TRL, model)} <= set(whole)
    assert whole[:3] == [(impl, "Llama-3-8B") for impl in ("ours", TRL, "ours simpo")]
