"""The operators on a GPU: values, gradients, bad ids, autocast, streams, graphs.

What has no `cuda` mark runs on the CPU too, where it rehearses the test's own lines.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from rmipo_lite.ops import device_flag, head_rows, linear_logps, native, pair_loss, rmipo_loss
from tests.ops.test_head import inputs, plain, worst

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
HALVES = [torch.bfloat16, torch.float16]


def flag(device: str) -> Tensor:
    index = torch.cuda.current_device() if device == "cuda" else None
    return device_flag(torch.device(device, index))


def run(function: Any, tensors: list[Tensor], upstream: Tensor, **options: Any) -> list[Tensor]:
    """Log-probs and the gradients of the tensors that ask for one."""
    leaves = [x.detach().requires_grad_(x.requires_grad) for x in tensors]
    logps = function(*leaves, **options)
    (logps * upstream.to(logps)).sum().backward()
    return [logps.detach(), *[x.grad for x in leaves if x.grad is not None]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize(
    ("n", "v", "options"),
    [
        (0, 5, {}),
        (1, 1, {}),
        (300, 3001, {"bias": True}),  # rows that begin anywhere
        (300, 4096, {}),
        (520, 20011, {"logit_softcap": 5.0, "logit_scale": 0.5, "bias": True}),
    ],
)
def test_the_head_against_float64(
    device: str, dtype: torch.dtype, trained_head: bool, n: int, v: int, options: dict[str, Any]
) -> None:
    hidden, weight, ids, bias = inputs(n, v, dtype, h=32)
    weight.requires_grad_(trained_head)
    tensors, upstream = [hidden, weight], torch.randn(n, dtype=torch.float64)
    wanted_options = {**options, "bias": bias.double()} if "bias" in options else options
    want = run(
        lambda h, w, **o: plain(h, w, ids, **o),
        [x.detach().double().requires_grad_(x.requires_grad) for x in tensors],
        upstream, **wanted_options,
    )  # fmt: skip
    given = {**options, "bias": bias.to(device)} if "bias" in options else options
    got = run(
        lambda h, w, **o: linear_logps(h, w, ids.to(device), impl="native", **o),
        [x.detach().to(device).requires_grad_(x.requires_grad) for x in tensors],
        upstream, **given,
    )  # fmt: skip
    rounding = torch.finfo(dtype).eps
    for ours, exact in zip(got, want, strict=True):
        scale = exact.abs().max().item() if exact.numel() else 0.0
        # 1e-5 of the scale beside the rounding of the results, as in test_head.py
        assert worst(ours.cpu(), exact) <= (4 * rounding + 1e-5) * (1 + scale)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", HALVES)
def test_log_probs_come_from_float32_logits(dtype: torch.dtype) -> None:
    """Of the size of full float32 logits' error; 16-bit ones would be off by a tenth here.

    Not the same: tensor cores cut where they add. How much worse is `benchmarks gpu`'s to measure.
    """
    hidden, weight, ids, _ = (x.detach().cuda() for x in inputs(256, 50257, dtype, h=512))
    exact = plain(hidden.double(), weight.double(), ids)
    full = plain(hidden.float(), weight.float(), ids)
    ours = linear_logps(hidden, weight, ids, impl="native")
    assert worst(ours, exact) <= 20 * worst(full, exact) + 1e-6


@pytest.mark.cuda
def test_rows_too_far_from_their_target_are_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second row's likeliest token is some hundred nats above its target."""
    hidden, weight, ids, _ = inputs(64, 4100, torch.bfloat16, h=32)
    with torch.no_grad():
        hidden[::2] *= 16
    real, again = native.row_exponentials, []

    def in_one_read(*arguments: Any) -> tuple[Tensor, Tensor]:
        logps, factors = real(*arguments)
        again.extend((factors == 1).tolist())
        return logps, factors

    monkeypatch.setattr(native, "row_exponentials", in_one_read)
    upstream = torch.randn(64, dtype=torch.float64)
    leaf = hidden.detach().double().requires_grad_()
    want = run(lambda h: plain(h, weight.double(), ids), [leaf], upstream)
    card = hidden.detach().cuda().requires_grad_()
    got = run(
        lambda h: linear_logps(h, weight.cuda(), ids.cuda(), impl="native"), [card], upstream.cuda()
    )
    assert 16 <= sum(again) <= 33  # half of them, less those whose target is likely; one unscored
    rounding = 4 * torch.finfo(torch.bfloat16).eps
    for ours, exact in zip(got, want, strict=True):
        assert worst(ours.cpu(), exact) <= rounding * (1 + exact.abs().max().item())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("loss_type", ["rmipo", "simpo", "hinge", "simper"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_pair_loss_is_the_references(device: str, loss_type: str, dtype: torch.dtype) -> None:
    lengths = torch.tensor([3, 700, 1, 129, 128, 2])
    borders = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    prior_borders = torch.cat([torch.zeros(1), (lengths - 1).clamp(min=0).cumsum(0)]).int()
    tokens = -torch.rand(int(borders[-1]), dtype=dtype)
    prior = -2 * torch.rand(int(prior_borders[-1]), dtype=dtype)
    both = []
    for impl, where in (("torch", "cpu"), ("native", device)):
        leaf = tokens.clone().to(where).requires_grad_()
        out = pair_loss(
            leaf, borders.to(where), prior.to(where), prior_borders.to(where),
            loss_type=loss_type, label_smoothing=0.0, impl=impl,
        )  # fmt: skip
        out.loss.sum().backward()  # the second pair's chosen side has no prior
        both.append([x.detach().cpu() for x in (*out, leaf.grad)])
    for want, got in zip(*both, strict=True):
        torch.testing.assert_close(got, want, equal_nan=True, atol=2e-6, rtol=1e-5)


@pytest.mark.cuda
def test_a_bad_target_sets_the_flag_and_raises_nothing() -> None:
    hidden, weight, ids, _ = inputs(4, 9, torch.float32)
    ids[0] = 2**40
    flag("cuda").zero_()
    logps = linear_logps(hidden.cuda(), weight.cuda(), ids.cuda(), impl="native")
    assert logps.isnan().tolist() == [True, False, False, False]
    assert flag("cuda").item() == 1


@pytest.mark.cuda
def test_wrong_borders_set_the_flag_and_read_nothing_outside() -> None:
    flag("cuda").zero_()
    tokens = torch.randn(4).cuda()
    borders = torch.tensor([0, 2, 2**30], dtype=torch.int32).cuda()
    out = pair_loss(tokens, borders, loss_type="simpo", impl="native")
    assert out.loss.isnan().all()
    assert flag("cuda").item() == 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALVES)
def test_autocast_changes_nothing(device: str, dtype: torch.dtype) -> None:
    hidden, weight, ids, _ = (x.detach().to(device) for x in inputs(40, 301, torch.float32))
    outside = linear_logps(hidden, weight, ids, impl="native")
    with torch.autocast(device, dtype):
        inside = linear_logps(hidden, weight, ids, impl="native")
    assert torch.equal(inside, outside)


@pytest.mark.cuda
def test_nothing_waits_for_the_gpu() -> None:
    """A synchronisation in the operators would be one per chunk and micro-step."""
    hidden, weight, ids, _ = (x.detach().cuda() for x in inputs(300, 3001, torch.bfloat16, h=32))
    borders = torch.tensor([0, 150, 300], dtype=torch.int32).cuda()

    def step() -> Tensor:
        leaf = hidden.detach().requires_grad_()
        logps = linear_logps(leaf, weight, ids, impl="native")
        loss = pair_loss(logps, borders, loss_type="simpo", impl="native").loss.sum()
        return torch.autograd.grad(loss, leaf)[0]

    step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it is a prototype
        try:
            torch.cuda.set_sync_debug_mode("error")
            gradient = step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert gradient.isfinite().all()


@pytest.mark.cuda
def test_another_stream_is_used_where_it_is_current() -> None:
    hidden, weight, ids, _ = (x.detach().cuda() for x in inputs(64, 5001, torch.float32))
    want = linear_logps(hidden, weight, ids, impl="native")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # what is queued here must wait behind it
        late = weight * 2
        got = linear_logps(hidden, late, ids, logit_scale=0.5, impl="native")
    stream.synchronize()
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.cuda
def test_a_graph_replays_it() -> None:
    hidden, weight, ids, _ = (x.detach().cuda() for x in inputs(64, 5001, torch.bfloat16, h=32))
    linear_logps(hidden, weight, ids, impl="native")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = linear_logps(hidden, weight, ids, impl="native")
    hidden.copy_(torch.randn_like(hidden))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, linear_logps(hidden, weight, ids, impl="native"))


@pytest.mark.parametrize("device", DEVICES)
def test_the_same_bits_twice(device: str) -> None:
    hidden, weight, ids, _ = inputs(200, 5001, torch.bfloat16, h=32)
    runs = [
        run(
            lambda h, w: linear_logps(h, w, ids.to(device), impl="native"),
            [hidden.detach().to(device).requires_grad_(), weight.to(device)],
            torch.ones(200),
        )
        for _ in range(2)
    ]
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("device", DEVICES)
def test_rmipo_loss(device: str) -> None:
    four = [-torch.rand(5, dtype=torch.float64) for _ in range(4)]
    want = rmipo_loss(*four, impl="torch")
    got = rmipo_loss(*(x.to(device) for x in four), impl="native")
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.cpu(), b)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("trained_head", [False, True])
def test_the_cut_into_chunks_changes_rounding_alone(
    device: str, trained_head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, ids, _ = inputs(300, 3001, torch.float32, h=32)
    tensors = [hidden.detach().to(device).requires_grad_(), weight.to(device)]
    tensors[1].requires_grad_(trained_head)
    impl = "native" if device == "cuda" else "torch"  # the CPU's kernels have blocks of their own
    runs = []
    for rows in (300, 77):
        monkeypatch.setattr(head_rows, "chunk_rows", lambda weight, rows=rows: rows)
        logps = partial(linear_logps, target_ids=ids.to(device), impl=impl)
        runs.append(run(logps, tensors, torch.ones(300)))
    for whole, cut in zip(*runs, strict=True):
        torch.testing.assert_close(cut, whole, atol=1e-4, rtol=1e-4)
