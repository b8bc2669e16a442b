"""The head by whole rows: a card's products and buffers on the CPU, rows of a chunk by card."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rmipo_lite.ops import head, head_rows, linear_logps
from rmipo_lite.ops.head_rows import HeadProducts
from tests.ops.test_head import inputs, plain, worst

aten = torch.ops.aten
V, H = 301, 24


class Card(TorchDispatchMode):
    """The products that only CUDA has, with the dtypes it asks for; shapes of whatever is made."""

    def __init__(self) -> None:
        super().__init__()
        self.products: set[Any] = set()
        self.made: set[tuple[int, ...]] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (aten.mm.dtype_out, aten.addmm.dtype_out):
            *added, left, right, dtype = args
            out = kwargs["out"]
            assert left.dtype == right.dtype
            assert {left.dtype} < {torch.bfloat16, torch.float16}
            assert dtype == out.dtype == torch.float32
            assert all(x.dtype == dtype for x in added)
            self.products.add(func)
            return out.copy_(sum(added, left.float() @ right.float()))
        made = func(*args, **kwargs)
        given = [x.untyped_storage()._cdata for x in (*args, *kwargs.values()) if is_tensor(x)]
        if is_tensor(made) and made.untyped_storage()._cdata not in given:
            self.made.add(tuple(made.shape))
        return made


def is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


class OnACard(HeadProducts):
    """Chooses as on a card; the last of them is kept."""

    card: Card
    last: OnACard

    def __init__(self, hidden: Tensor, weight: Tensor) -> None:
        super().__init__(hidden, weight)
        self.mixed, self.cast = True, False
        OnACard.last = self

    def logits(self, rows: slice) -> Tensor:
        with self.card:
            return super().logits(rows)

    def times_weight(self, grads: Tensor, out: Tensor) -> None:
        with self.card:
            super().times_weight(grads, out)

    def add_weight_grad(self, grads: Tensor, rows: slice, target_ids: Tensor, out: Tensor) -> None:
        with self.card:
            super().add_weight_grad(grads, rows, target_ids, out)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    monkeypatch.setattr(head, "HeadProducts", OnACard)
    OnACard.card = Card()
    return OnACard.card


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trained_head", [False, True])
def test_the_products_of_a_card(card: Card, dtype: torch.dtype, trained_head: bool) -> None:
    """Two chunks; a second (V, H) in float32 beside a trained head's gradient would be 2 GB."""
    hidden, weight, ids, _ = inputs(300, V, dtype, H)
    weight.requires_grad_(trained_head)
    leaves = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    logps, want = linear_logps(hidden, weight, ids, impl="torch"), plain(*leaves, ids)
    upstream = torch.randn(300)
    logps.backward(upstream)
    want.backward(upstream.double())
    assert len(OnACard.last.chunks) == 2
    pairs = [(logps, want), (hidden.grad, leaves[0].grad), (weight.grad, leaves[1].grad)]
    for got, exact in pairs[: 2 + trained_head]:
        rounding = 4 * torch.finfo(dtype).eps + 1e-5
        assert worst(got, exact) <= rounding * (1 + exact.abs().max().item())
    assert card.products == {aten.mm.dtype_out, *[aten.addmm.dtype_out] * trained_head}
    assert (V, H) not in card.made


def test_a_pass_without_gradients_has_no_room_for_a_derivative(card: Card) -> None:
    hidden, weight, ids, _ = inputs(40, V, torch.bfloat16, H)
    with torch.no_grad():
        linear_logps(hidden, weight, ids, impl="torch")
    assert "grads" not in vars(OnACard.last)
    linear_logps(hidden, weight, ids, impl="torch")
    last = OnACard.last
    assert "grads" not in vars(last)  # plain PyTorch makes its own
    assert last.grads is last.grads
    assert last.grads.dtype == torch.bfloat16
    row_bytes = V * head_rows._row_itemsize(weight)
    assert last.buffer.nbytes + last.grads.nbytes == 40 * row_bytes


@pytest.mark.parametrize(
    ("vocab", "cache_mib", "memory_gib", "rows"),
    [
        (128256, 50, 79, 2048),  # H100: 1.58 GB of the 1.6
        (128256, 6, 48, 2048),
        (128256, 6, 23.6, 1024),  # RTX 3090: a thirtieth of the card
        (128256, 48, 22.1, 1024),  # L4
        (128256, 4, 15, 512),  # T4: a fortieth
        (128256, 3, 12, 384),
        (128256, 3, 8, 256),
        (262144, 3, 8, 128),  # never fewer, whatever it takes
        (32000, 150, 80, 256),  # in a third of the cache
        (32000, 3, 24, 2048),
        (1, 50, 80, 2048),
    ],
)
def test_rows_of_a_chunk_by_card(vocab: int, cache_mib: int, memory_gib: float, rows: int) -> None:
    memory = int(memory_gib * 2**30)
    assert head_rows.card_rows(6 * vocab, cache_mib * 2**20, memory) == rows
