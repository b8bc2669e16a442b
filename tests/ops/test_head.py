"""linear_logps: values and gradients against float64, registration, odd inputs, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rmipo_lite.ops import head_blocks, head_rows, linear_logps

IMPLS = ["torch", "native"]


def plain(hidden, weight, target_ids, bias=None, logit_softcap=None, logit_scale=1.0) -> Tensor:
    """The definition, holding all logits."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * logit_scale
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    return -torch.nn.functional.cross_entropy(logits, target_ids, reduction="none")


def inputs(
    n: int, v: int, dtype: torch.dtype, h: int = 24
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ids = torch.randint(0, v, (n,))
    ids[n // 2 : n // 2 + 1] = -100
    hidden = torch.randn(n, h).to(dtype).requires_grad_()
    return hidden, torch.randn(v, h).to(dtype), ids, torch.randn(v).to(dtype)


def worst(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).abs().max().item() if a.numel() else 0.0


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize(
    ("n", "v", "options"),
    [
        (0, 5, {}),
        (1, 1, {}),
        (300, 3001, {"bias": True}),
        (7, 2049, {"logit_softcap": 5.0, "logit_scale": 0.5, "bias": True}),
    ],
)
def test_against_float64(impl, dtype, trained_head, n, v, options, monkeypatch) -> None:
    """Error at most twice that of plain autograd in the same dtype, plus 1e-5 of the scale."""
    # several blocks of the weight
    monkeypatch.setattr(head_rows, "_BLOCK_ELEMENTS", 24 * 1000)
    monkeypatch.setattr(head_blocks, "_MOST_ROWS", 128)
    monkeypatch.setattr(head_blocks, "CPU_BLOCK_BYTES", 128 * 1000 * 4)
    hidden, weight, ids, bias = inputs(n, v, dtype)
    weight.requires_grad_(trained_head)
    options = {**options, "bias": bias if options.get("bias") else None}
    upstream = torch.randn(n, dtype=torch.float64)

    def run(function, dtype, **extra):
        leaves = [x.detach().to(dtype).requires_grad_(x.requires_grad) for x in (hidden, weight)]
        bias64 = None if options["bias"] is None else options["bias"].to(dtype)
        logps = function(*leaves, ids, **{**options, "bias": bias64}, **extra)
        (logps * upstream.to(logps.dtype)).sum().backward()
        return logps.detach(), *[x.grad for x in leaves if x.requires_grad]

    truth, naive = run(plain, torch.float64), run(plain, dtype)
    ours = run(linear_logps, dtype, impl=impl)
    assert ours[0].dtype == torch.promote_types(dtype, torch.float32)
    relative = 1e-12 if dtype == torch.float64 else 1e-5
    for got, bad, want in zip(ours, naive, truth, strict=True):
        scale = want.abs().max().item() if want.numel() else 0.0
        assert worst(got, want) <= 2 * worst(bad, want) + relative * (1 + scale)
    assert ours[0][ids == -100].eq(0).all()
    assert ours[1][ids == -100].eq(0).all()


@pytest.mark.parametrize("own_products", [False, True])
@pytest.mark.parametrize("options", [{}, {"logit_softcap": 5.0, "logit_scale": 0.5}])
def test_bfloat16_with_and_without_its_own_products(own_products, options, monkeypatch) -> None:
    """Both ways run on every CPU (oneDNN has a slow bfloat16 product where the CPU has none)."""
    monkeypatch.setattr(head_blocks, "multiplies_bfloat16", lambda: own_products)
    monkeypatch.setattr(head_blocks, "CPU_BLOCK_BYTES", 2**16)
    hidden, weight, ids, _ = inputs(65, 3008, torch.bfloat16, h=32)
    truth_leaf = hidden.detach().double().requires_grad_()
    truth = plain(truth_leaf, weight.double(), ids, **options)
    truth.sum().backward()
    logps = linear_logps(hidden, weight, ids, impl="native", **options)
    logps.sum().backward()
    if own_products:
        # The logits are what bfloat16 has: the truth is float64 of the same rounded ones.
        rounded = (hidden.detach() @ weight.T).double() * options.get("logit_scale", 1.0)
        if options:
            rounded = 5.0 * torch.tanh(rounded / 5.0)
        truth = -torch.nn.functional.cross_entropy(rounded, ids, reduction="none")
    assert worst(logps, truth) < 2e-5

    def error(gradient: Tensor) -> float:
        return float((gradient.double() - truth_leaf.grad).norm() / truth_leaf.grad.norm())

    naive = hidden.detach().requires_grad_()
    plain(naive, weight, ids, **options).sum().backward()
    assert error(hidden.grad) < 1.1 * error(naive.grad)


def test_a_target_that_is_nearly_certain_keeps_its_small_gradient() -> None:
    """1 - p is a sum of small numbers, not a difference of nearly equal ones."""
    weight = torch.tensor([[20.0], [0.0], [1.0]])
    hidden = torch.tensor([[1.0]], requires_grad=True)
    linear_logps(hidden, weight, torch.tensor([0]), impl="native").backward(torch.ones(1))
    leaf = hidden.detach().double().requires_grad_()
    want = torch.log_softmax(leaf @ weight.double().T, 1)[0, 0]
    want.backward()
    assert hidden.grad.item() == pytest.approx(leaf.grad.item(), rel=1e-5)


@pytest.mark.parametrize("where", ["first", "last"])
def test_blocks_of_minus_infinity_and_rising_maxima(where, monkeypatch) -> None:
    """A whole block may hold nothing but -inf, before or after the block with the target."""
    monkeypatch.setattr(head_blocks, "CPU_BLOCK_BYTES", 4 * 4 * 2)
    bias = torch.cat([torch.full((4,), -torch.inf), torch.arange(8.0) * 30])
    ids = torch.tensor([6, 11])
    if where == "last":
        bias, ids = bias.flip(0), 11 - ids
    hidden, weight = torch.zeros(2, 3, requires_grad=True), torch.randn(12, 3)
    logps = linear_logps(hidden, weight, ids, bias=bias, impl="native")
    logps.sum().backward()
    leaf = hidden.detach().double().requires_grad_()
    want = plain(leaf, weight.double(), ids, bias.double())
    want.sum().backward()
    torch.testing.assert_close(logps.double(), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(hidden.grad.double(), leaf.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_large_vocabulary_in_fp32(impl: str) -> None:
    hidden, weight, ids, _ = inputs(3, 151_936, torch.float32, h=4)
    want = plain(hidden.double(), weight.double(), ids)
    assert worst(linear_logps(hidden, weight, ids, impl=impl), want) < 1e-5


def test_plain_pytorch_sums_a_large_vocabulary_in_pairs() -> None:
    """A running float32 sum over 256k tokens would be off by 2e-5."""
    hidden, weight, ids, _ = inputs(2, 256_000, torch.float16, h=8)
    want = plain(hidden.double(), weight.double(), ids, logit_softcap=3.0)
    got = linear_logps(hidden, weight, ids, impl="torch", logit_softcap=3.0)
    assert worst(got, want) < 5e-6


@pytest.mark.parametrize("trained_head", [False, True])
def test_a_softcap_keeps_the_digits_of_small_logits(trained_head: bool) -> None:
    """1 - exp(x) loses them: logits of 1e-3 under a cap of 30 were off by 3e-6."""
    hidden, weight, ids, _ = inputs(64, 7, torch.float32)
    weight = (weight * 1e-3).requires_grad_(trained_head)
    want = plain(hidden.double(), weight.double(), ids, logit_softcap=30.0)
    assert worst(linear_logps(hidden, weight, ids, impl="native", logit_softcap=30.0), want) < 5e-7


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize("width", [7, 32])  # of a bfloat16 tile and not
def test_nan_in_an_ignored_row_stays_there(impl, dtype, trained_head, width) -> None:
    hidden, weight, ids, bias = inputs(40, 2049, dtype, h=width)
    ids[::2] = -100
    results = []
    for value in (0.0, math.nan):
        leaf = hidden.detach().clone()
        leaf[::2] = value
        leaf.requires_grad_()
        head = [x.detach().clone().requires_grad_(trained_head) for x in (weight, bias)]
        logps = linear_logps(leaf, head[0], ids, bias=head[1], impl=impl)
        logps.sum().backward()
        results.append([logps, leaf.grad, *(x.grad for x in head if trained_head)])
    for with_nan, clean in zip(*reversed(results), strict=True):
        assert clean.isfinite().all()
        assert torch.equal(with_nan, clean)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("trained_head", [False, True])
def test_a_row_that_nothing_asks_for_has_no_gradient_whatever_it_holds(impl, trained_head) -> None:
    hidden, weight, ids, _ = inputs(6, 19, torch.float32)
    leaf = hidden.detach().clone()
    leaf[1] = math.nan
    leaf.requires_grad_()
    weight.requires_grad_(trained_head)
    logps = linear_logps(leaf, weight, ids, impl=impl)
    assert logps.isnan().tolist() == [False, True, False, False, False, False]
    logps.backward(torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 1.0]))
    assert leaf.grad[1].eq(0).all()
    assert leaf.grad.isfinite().all()
    assert weight.grad is None or weight.grad.isfinite().all()


def test_bfloat16_products_sum_over_whole_tiles() -> None:
    """A product over another number of elements reads on into the next row."""
    for width, vocab in ((7, 2049), (32, 2049), (64, 31), (64, 64)):
        hidden, weight = torch.zeros(300, width).bfloat16(), torch.zeros(vocab, width).bfloat16()
        blocks = head_blocks.Blocks.of(hidden, weight)
        ranges = blocks.column_ranges
        assert [r.start for r in ranges] == [0, *(r.stop for r in ranges[:-1])]
        assert ranges[-1].stop == vocab
        for columns in ranges:
            if blocks.dtype_of(columns) == torch.bfloat16:
                assert width % 32 == 0
                assert (columns.stop - columns.start) % 32 == 0


@pytest.mark.parametrize("impl", IMPLS)
def test_gradcheck(impl: str) -> None:
    hidden, weight, ids, bias = inputs(5, 13, torch.float64)
    options = {"logit_softcap": 3.0, "logit_scale": 0.7, "impl": impl}
    assert torch.autograd.gradcheck(
        lambda h: linear_logps(h, weight, ids, bias=bias, **options), (hidden,)
    )
    leaves = (hidden, weight.requires_grad_(), bias.requires_grad_())
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_logps(h, w, ids, bias=b, **options), leaves
    )


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_registration(mode: int) -> None:
    hidden, weight, ids, bias = inputs(5, 13, torch.float32)
    hidden.requires_grad_(mode > 0)
    weight.requires_grad_(mode == 2)
    args = (hidden, weight, ids, bias, 5.0, 1.0, mode, "native")
    torch.library.opcheck(torch.ops.rmipo_lite.linear_logps, args)


def test_compiles_in_one_graph() -> None:
    hidden, weight, ids, _ = inputs(6, 19, torch.float32)
    compiled = torch.compile(linear_logps, fullgraph=True, backend="aot_eager")
    compiled(hidden, weight, ids).sum().backward()
    grad, hidden.grad = hidden.grad, None
    linear_logps(hidden, weight, ids).sum().backward()
    assert torch.equal(grad, hidden.grad)


def test_second_derivative_is_refused() -> None:
    hidden, weight, ids, _ = inputs(3, 5, torch.float32)
    with pytest.raises(RuntimeError, match="linear_logps: second derivatives"):
        torch.autograd.grad(linear_logps(hidden, weight, ids).sum(), hidden, create_graph=True)


def _freed(*shape: int) -> Tensor:
    """What sharding leaves of a weight: a shape without memory."""
    weight = torch.zeros(shape)
    weight.untyped_storage().resize_(0)
    return weight


@pytest.mark.parametrize("impl", IMPLS)
def test_non_finite_logits_stay_in_their_row(impl: str) -> None:
    hidden = torch.eye(4)
    weight = torch.zeros(6, 4)
    weight[2, 0] = math.nan
    weight[2, 1], weight[2, 2], weight[2, 3] = 1e4, -1e4, 65504.0
    ids = torch.tensor([0, 2, 2, 0])
    logps = linear_logps(hidden.requires_grad_(), weight, ids, impl=impl)
    # NaN * 0 is NaN in every row of the product: that is the matrix product's, not ours.
    assert logps.isnan().all()
    weight[2, 0] = 0.0
    logps = linear_logps(hidden, weight, ids, impl=impl)
    want = [-math.log(6), 0.0, -1e4 - math.log(5), -65504.0]
    assert logps.tolist() == pytest.approx(want)
    logps.sum().backward()
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_unscored_rows_may_hold_anything(impl: str) -> None:
    hidden, weight, ids, _ = inputs(5, 9, torch.float32)
    ids[:] = -100
    with torch.no_grad():
        hidden[1] = math.nan
    logps = linear_logps(hidden, weight, ids, impl=impl)
    logps.sum().backward()
    assert logps.eq(0).all()
    assert hidden.grad.eq(0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_views_equal_their_copies(impl: str) -> None:
    big, wide = torch.randn(8, 2 * 24), torch.randn(24, 15)
    ids = torch.randint(0, 15, (16,))[::2]
    for hidden in (big[:, ::2], big[:, 1:25], big[:1, :24].expand(8, 24)):
        got = linear_logps(hidden, wide.T, ids, impl=impl)
        want = linear_logps(hidden.contiguous(), wide.T.contiguous(), ids.contiguous(), impl=impl)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    bias = torch.randn(30)[::2]
    got = linear_logps(hidden, wide.T, ids, bias=bias, impl=impl)
    want = linear_logps(hidden, wide.T, ids, bias=bias.contiguous(), impl=impl)
    assert torch.equal(got, want)


def test_inputs_are_not_written_and_threads_agree() -> None:
    hidden, weight, ids, bias = inputs(300, 2000, torch.float32)
    before = [x.detach().clone() for x in (hidden, weight, ids, bias)]
    results, threads = [], torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        hidden.grad = None
        logps = linear_logps(hidden, weight, ids, bias=bias, impl="native")
        logps.sum().backward()
        results.append((logps.detach(), hidden.grad))
    torch.set_num_threads(threads)
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(x, y) for x, y in zip((hidden, weight, ids, bias), before, strict=True))


def test_autocast_changes_nothing() -> None:
    hidden, weight, ids, _ = inputs(6, 19, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = linear_logps(hidden, weight, ids)
    assert torch.equal(inside, linear_logps(hidden, weight, ids))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.zeros(5, 24, dtype=torch.int32)}, TypeError, "hidden must be float32"),
        ({"hidden": torch.zeros(24)}, ValueError, r"\(num_tokens, hidden_size\), got \(24,\)"),
        ({"weight": torch.zeros(9, 23)}, ValueError, r"weight must have shape .* got \(9, 23\)"),
        (
            {"weight": torch.zeros(9, 24).double()},
            TypeError,
            "weight must have the dtype of hidden",
        ),
        ({"weight": torch.zeros(9, 24, device="meta")}, ValueError, "weight must be on the device"),
        ({"target_ids": torch.zeros(5)}, TypeError, "target_ids must have dtype, torch.int64"),
        ({"target_ids": torch.zeros(4).long()}, ValueError, r"= \(5,\), got \(4,\)"),
        ({"target_ids": torch.tensor([0, 0, -1, 0, 0])}, ValueError, "got -1 at row 2"),
        (
            {"target_ids": torch.tensor([0, 0, 0, 0, 9])},
            ValueError,
            "0 to 8 or -100 .* got 9 at row 4",
        ),
        ({"target_ids": torch.tensor([2**40, 0, 0, 0, 0])}, ValueError, f"got {2**40} at row 0"),
        ({"bias": torch.zeros(8)}, ValueError, r"bias must have shape \(vocab_size,\) = \(9,\)"),
        ({"logit_softcap": 0.0}, ValueError, "logit_softcap must be positive or None, got 0.0"),
        ({"logit_scale": math.nan}, ValueError, "logit_scale must be finite, got nan"),
        ({"impl": "fast"}, ValueError, "impl must be auto, native or torch, got 'fast'"),
        ({"weight": [1.0]}, TypeError, "linear_logps: weight must be a tensor, got list"),
        ({"hidden": torch.zeros(5, 24).to_sparse()}, ValueError, "hidden must be dense, got layo"),
        ({"bias": None, "weight": _freed(9, 24)}, ValueError, r"weight must hold its values.*fre"),
    ],
)
def test_refusals(change: dict, error: type[Exception], message: str) -> None:
    arguments = {
        "hidden": torch.zeros(5, 24), "weight": torch.zeros(9, 24),
        "target_ids": torch.zeros(5, dtype=torch.int64),
    }  # fmt: skip
    with pytest.raises(error, match=message):
        linear_logps(**{**arguments, **change})
