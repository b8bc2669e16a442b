"""The head's benchmark for a GPU, on the CPU: what its floors do, and that ours is the kernels."""

from __future__ import annotations

import gc

import pytest
import torch

from benchmarks import gpu_head, peers
from benchmarks.gpu_head import Case
from rmipo_lite.ops import head_rows, native
from rmipo_lite.ops.library import BackendStatus


@pytest.fixture
def case() -> Case:
    return Case(gpu_head.REHEARSAL, torch.device("cpu"))


def test_the_floor_multiplies_what_ours_computed(case: Case) -> None:
    """Zeros or left-over memory run faster on a card than derivatives do."""
    leaf = case.hidden.float().requires_grad_()
    peers.plain_logps(leaf, case.weight.float(), case.target_ids).sum().backward()
    with gpu_head.chunks_of(16):
        out = case.floor()()
    assert leaf.grad is not None
    assert leaf.grad.abs().max() > 0.1
    torch.testing.assert_close(out[:16], leaf.grad[:16], atol=2e-5, rtol=1e-4)


def test_one_floor_has_our_chunks_and_the_other_has_its_own(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    product = head_rows.HeadProducts.logits

    def watched(self: head_rows.HeadProducts, rows: slice) -> torch.Tensor:
        counts.append(rows.stop - rows.start)
        return product(self, rows)

    with gpu_head.chunks_of(16):
        floors = case.floor(), case.unchunked_floor()
    monkeypatch.setattr(head_rows.HeadProducts, "logits", watched)
    floors[0]()
    assert counts == [16] * 4
    floors[1]()
    assert counts == [16] * 4 + [64]


def test_without_kernels_nothing_passes_for_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = BackendStatus(False, None, None, "no compiler")
    monkeypatch.setattr(native, "status", lambda device_type: missing)
    for bench in (gpu_head.bench, gpu_head.bench_peers):
        with pytest.raises(RuntimeError, match="extension for cpu is missing: no compiler"):
            next(bench(rehearse=True))


def test_every_row_of_the_head_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "collect", int)  # 30 times before a clock: seconds here
    rows = list(gpu_head.bench(rehearse=True))
    found = {(row.impl, row.metric) for row in rows if isinstance(row.value, float)}
    assert {("ours", f"time in chunks of {n} rows") for n in (256, 512, 1024, 2048, 4096)} <= found
    for floor in ("floor", "unchunked floor"):
        assert {(floor, "time"), ("ours", f"time over {floor}")} <= found

    def module(name: str) -> None:
        raise peers.Absent(name)

    monkeypatch.setattr(peers, "module", module)  # they take seconds to import
    others = list(gpu_head.bench_peers(rehearse=True))
    assert {"trl chunked head", "liger chunked SimPO", "cut-cross-entropy"} <= {
        row.impl for row in others
    }
    assert not [row for row in others if (row.impl, row.metric) == ("ours", "time")]
