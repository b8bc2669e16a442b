"""The benchmarks' own correctness: what is compared does the same work, and rows tell the truth."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import (
    child,
    gpu_models,
    head,
    inputs,
    memory,
    peers,
    records,
    report,
    rounds,
    run,
    step,
)
from benchmarks.__main__ import main
from benchmarks.authors import authors_step, pad_pairs
from benchmarks.floors import StepFloor, head_floor
from benchmarks.records import Record
from rmipo_lite.model import batch
from rmipo_lite.ops import head_blocks
from tests.conftest import ROOT
from tests.test_golden import BATCHES, _model, _read, _tokens

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"


@pytest.mark.parametrize("name", ["model_random", "model_sft"])
def test_the_authors_step_gives_the_recorded_values(name: str) -> None:
    """Written from a description: here it is held against what their code computed."""
    model = _model(name)
    recorded = _read("pairs.json.gz")[f"{name}/f32/keep_end"]["batch"]
    for key in BATCHES:
        pairs = [_tokens("keep_end")[pair] for pair in recorded[key]["names"]]
        wanted = recorded[key]["rmipo"]
        model.zero_grad()
        out = authors_step(model, pad_pairs(pairs, pad_id=2))
        out.loss.backward()
        for got, name in (
            (out.losses, "losses"), (out.chosen_logps, "chosen_logps"), (out.gamma, "gamma"),
            (out.rejected_logps, "rejected_logps"), (out.pmi_gap, "delta_pmi"),
        ):  # fmt: skip
            assert got.tolist() == pytest.approx(wanted[name], abs=2e-5), f"{key} {name}"
        for metric in ("logits/chosen", "rewards/margins", "rewards/accuracies"):
            assert float(out.metrics[metric]) == pytest.approx(wanted["metrics"][metric], abs=1e-4)
        squares = sum(float(p.grad.double().norm()) ** 2 for p in model.parameters())
        assert squares**0.5 == pytest.approx(wanted["grad"]["total_norm"], rel=1e-4)


@pytest.fixture(scope="module")
def small() -> torch.nn.Module:
    return inputs.lora_llama(301, torch.float32, layers=2)


def test_everybody_computes_the_same_loss(small: torch.nn.Module, tmp_path: Path) -> None:
    """Otherwise a ratio of times says nothing."""
    pairs = inputs.draw_pairs(2, 301, seed=1)
    padded = pad_pairs(pairs)
    ours = step.pair_step(small, torch.float32, str(tmp_path), gamma_scaled_by_beta=True)
    inside = ours.train(pairs, lambda loss: loss.backward()).loss
    torch.testing.assert_close(authors_step(small, padded).loss, inside, atol=1e-5, rtol=0)
    try:
        chunked = peers.TrlChunkedStep(small)
    except peers.Absent as reason:
        pytest.skip(str(reason))
    outside = step.pair_step(small, torch.float32, str(tmp_path)).train(
        pairs, lambda loss: loss.backward()
    )
    torch.testing.assert_close(chunked(padded).detach(), outside.loss, atol=1e-5, rtol=0)


def test_the_step_floor_does_the_products_of_the_step(
    small: torch.nn.Module, tmp_path: Path
) -> None:
    """Counted in multiplications: the floor has what our step has, to 0.2 %."""
    from torch.utils.flop_counter import FlopCounterMode

    pairs = inputs.draw_pairs(2, 301, seed=2)
    ours = step.pair_step(small, torch.float32, str(tmp_path))
    counts = []
    for work in (lambda: ours.train(pairs, lambda loss: loss.backward()), StepFloor(small, pairs)):
        with FlopCounterMode(
            display=False, custom_mapping={torch.ops.aten.addmm_: _addmm}
        ) as counter:
            work()
        counts.append(counter.get_total_flops())
    # The counter doesn't look into our operator: two products for the policy, one for the prior.
    scored = [
        len(batch.policy_input(pairs, packing=True).target_ids),
        len(batch.prior_input(pairs, packing=True).target_ids),
    ]
    heads = 2 * inputs.HIDDEN_SIZE * 301 * (2 * scored[0] + scored[1])
    assert counts[1] == pytest.approx(counts[0] + heads, rel=0.002)


def _addmm(_: torch.Size, a: torch.Size, b: torch.Size, *args: object, **kwargs: object) -> int:
    return 2 * a[0] * a[1] * b[1]


def test_the_head_floor_takes_our_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_blocks, "_MOST_ROWS", 8)
    monkeypatch.setattr(head_blocks, "CPU_BLOCK_BYTES", 8 * 7 * 4)
    shapes: list[tuple[int, ...]] = []
    product = torch.mm

    def watched(a: torch.Tensor, b: torch.Tensor, **options: object) -> torch.Tensor:
        shapes.append((*a.shape, b.shape[1]))
        return product(a, b, **options)

    monkeypatch.setattr(torch, "mm", watched)
    head_floor(torch.randn(20, 5), torch.randn(16, 5))
    first = [shape for shape in shapes if shape[1] == 5]
    assert sum(rows * columns for rows, _, columns in first) == 20 * 16
    assert len(first) == 6  # 3 ranges of rows by 2 of columns
    assert len(shapes) == 12


def test_rounds_interleave_in_a_new_order_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds.gc, "collect", lambda: 0)  # 28 times over a whole suite's objects
    order: list[str] = []
    runs = {name: (lambda name=name: order.append(name)) for name in "abcdef"}
    seconds = rounds.interleave(runs, rounds=4)
    assert [len(times) for times in seconds.values()] == [4] * 6
    rounds_of = ["".join(order[i : i + 6]) for i in range(0, 30, 6)]
    assert all(sorted(names) == list("abcdef") for names in rounds_of)
    assert len(set(rounds_of)) > 3


def test_summary_and_ratios_by_hand() -> None:
    assert rounds.summarize([4.0, 1.0, 3.0, 2.0, 5.0]) == (3.0, 2.0, 4.0)
    assert rounds.summarize([7.0]) == (7.0, 7.0, 7.0)
    assert rounds.ratios([1.0, 3.0], [2.0, 2.0]) == [0.5, 1.5]


def test_rows_survive_the_file_and_newer_ones_replace(tmp_path: Path) -> None:
    path = tmp_path / "rows" / "head.csv"
    rows = [
        Record("head", "ours", "V=1 N=2", "fp32", "time", "s", 0.123456789, 0.1, 0.2),
        Record("head", "cce", "V=1 N=2", "fp32", "time", "s", "absent: no triton, no GPU"),
    ]
    records.write(path, rows)
    read = records.read(path)
    assert read[0].value == pytest.approx(0.12346)
    assert read[1].value == "absent: no triton, no GPU"
    assert read[0].torch == torch.__version__
    records.write(path, [Record("head", "ours", "V=1 N=2", "fp32", "time", "s", 9.0)])
    assert [row.value for row in records.read(path)] == [9.0, "absent: no triton, no GPU"]


@pytest.mark.slow
def test_a_quick_benchmark_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["head", "--quick", "--output_dir", str(tmp_path)])
    assert "time over floor" in capsys.readouterr().out
    rows = records.read(tmp_path / "quick" / "head.csv")
    named = {row.impl for row in rows}
    assert {"ours", "floor", "plain autograd", "trl chunked head", "cut-cross-entropy"} <= named
    for row in rows:  # who can't run here says so
        assert isinstance(row.value, float) or row.value.startswith("absent: ")


def test_a_missing_kernel_is_heard_and_the_peers_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows(*_: object) -> Iterator[Record]:
        warnings.warn("rmipo_lite: plain PyTorch does the work on cpu", stacklevel=1)
        warnings.warn("a peer's", stacklevel=1)
        yield Record("head", "ours", "V=1 N=2", "fp32", "time", "s", 0.1)

    monkeypatch.setattr(run, "_rows", rows)
    with pytest.warns(UserWarning, match="plain PyTorch") as heard:
        run.run("head", tmp_path)
    assert len(heard) == 1


def test_so_is_what_a_child_says_of_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "speaker.py").write_text(
        "import warnings\n"
        "warnings.warn('rmipo' '_lite: plain PyTorch does the work')\n"  # its line is shown too
        "warnings.warn('a peer of ours')\n"
        "print('Packed batches are off for this model: why')\n"
        "print('loading')\n"
        "print([1, 2])\n"
    )
    answer = child.ask("speaker", None, "speaking", 60, {"PYTHONPATH": str(tmp_path)})
    assert answer == [1, 2]
    said = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[-2:] for line in said] == [
        ["rmipo_lite", "plain PyTorch does the work"],
        ["Packed batches are off for this model", "why"],
    ]


@pytest.mark.slow
def test_preparing_the_demo_pairs_is_measured() -> None:
    rows = list(run._rows("data", True, None, None))
    speeds = {row.impl: row.value for row in rows if row.metric == "rows per second"}
    assert speeds["ours"] > 0
    assert "trl" in speeds


@pytest.mark.parametrize(
    ("name", "millions"), [("Llama-3-8B", 8030.3), ("Qwen2.5-3B", 3085.9), ("Qwen2.5-0.5B", 494.0)]
)
def test_the_shapes_are_those_of_the_models(name: str, millions: float) -> None:
    shape = gpu_models.SHAPES[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape.config(**shape.options))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


def test_a_random_model_in_4_bits_is_whole() -> None:
    model = gpu_models.random_model("rehearsal", torch.device("cpu"))
    kinds = {name: type(p).__name__ for name, p in model.named_parameters()}
    assert not [name for name, p in model.named_parameters() if p.device.type == "meta"]
    assert not [name for name, b in model.named_buffers() if b.device.type == "meta"]
    assert kinds["model.layers.1.mlp.up_proj.weight"] == "Params4bit"
    assert kinds["model.embed_tokens.weight"] == "Parameter"
    assert model.lm_head.weight is model.model.embed_tokens.weight  # type: ignore[union-attr]
    logits = model(torch.arange(14).view(2, 7)).logits
    assert logits.isfinite().all()
    assert logits.std() > 0


def test_a_gpu_is_wanted_where_one_is_measured(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(RuntimeError, match="--quick rehearses it without one"):
        main(["gpu", "--output_dir", str(tmp_path)])


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # which finds the benchmarks from wherever one stands
    (peak,) = memory._in_child("head", "ours", 32000, "fp32", 1024)
    # Direction and gradient (1024 x 512 each) and the block of logits, and little more.
    least = 2 * 1024 * 512 * 4 + head_blocks.CPU_BLOCK_BYTES
    assert least * 0.9 < peak < 3 * least


@pytest.mark.slow
def test_memory_names_a_peer_that_is_absent() -> None:
    try:
        peers.TrlChunkedStep(torch.nn.Identity())
    except peers.Absent:
        with pytest.raises(peers.Absent, match="trl"):
            memory._in_child("step", "trl chunked head", 301, "fp32", 1)
    else:
        assert memory._in_child("step", "trl chunked head", 301, "fp32", 1)[0] > 0


def test_the_page_shows_what_the_rows_say() -> None:
    """`python -m benchmarks report` was run after the last measurement."""
    rows = report.read_all(ROOT / "benchmarks")
    assert rows
    table = report.table(rows)
    assert f"{BEGIN}\n{table}\n{END}" in (ROOT / report.PAGE).read_text()


def test_the_report_writes_table_and_plot(tmp_path: Path) -> None:
    rows = [
        Record(
            "step", "ours", "V=32000 2 pairs", "fp32", "time over floor", "ratio", 1.5, 1.4, 1.6
        ),
        Record("step", "ours", "V=32000 2 pairs", "fp32", "time", "s", 0.5),
        Record("head", "ours", "V=32000 N=1024", "fp32", "growth: time", "s", 0.1),
        Record("head", "ours", "V=65536 N=1024", "fp32", "growth: time", "s", 0.2),
    ]
    folder = tmp_path / "benchmarks"
    records.write(folder / "step.csv", rows)
    page = tmp_path / report.PAGE
    page.parent.mkdir()
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    main(["report", "--output_dir", str(folder)])
    text = page.read_text()
    assert "| 1.50 (1.40–1.60) | – | step.csv |" in text
    assert "old" not in text
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert (folder / report.PLOT).stat().st_size > 10_000


def test_a_cards_rows_leave_the_table_as_it_is(tmp_path: Path) -> None:
    step = Record("step", "ours", "V=32000 2 pairs", "fp32", "time over floor", "ratio", 1.5)
    card = {"device": "NVIDIA H200", "date": "2999-01-01"}
    records.write(tmp_path / "benchmarks" / "step.csv", [step])
    page = tmp_path / report.PAGE
    page.parent.mkdir()
    page.write_text(f"{BEGIN}\n{END}\n")
    before = report.write(tmp_path / "benchmarks", page)
    shape = "Llama-3-8B 200/300/274"
    rows = [
        Record("gpu", "unchunked floor", "N=1 H=1 V=1", "bf16", "time", "s", 1.0, **card),
        Record(
            "gpu step", "ours simpo", f"{shape}, packed, 9 tokens", "", "time", "s", 1.0, **card
        ),
        Record("gpu step", "ours simpo", shape, "", "time", "s", "absent: no time left", **card),
    ]
    records.write(tmp_path / "benchmarks" / "gpu.csv", rows)
    assert records.read(tmp_path / "benchmarks" / "gpu.csv") == rows
    assert report.write(tmp_path / "benchmarks", page) == before
    assert "1.50" in before


def test_a_page_without_markers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("nothing")
    with pytest.raises(ValueError, match="wanted the markers"):
        report.put_between(tmp_path / "README.md", report.MARK, "a table")


def test_the_shapes_of_the_report_are_those_measured() -> None:
    """A renamed shape would leave dashes in the table."""
    measured = {f"V={v} {step.PAIRS} pairs" for v, _ in step.CASES}
    assert set(report._STEP) <= measured
    assert set(report._HEAD) <= {f"V={v} N={n}" for v in head.VOCABULARIES for n in head.TOKENS}
    assert set(report._KEPT) == {
        f"V={v} {step.PAIRS} pairs{run._KEEPING_NOTE}" for v, _ in step.KEEPING_CASES
    }
