"""What the operators are tried on: random arguments of odd shapes, dtypes and memory layouts."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from rmipo_lite.ops import library, linear_logps
from rmipo_lite.ops.head_blocks import Blocks
from rmipo_lite.ops.native import Impl
from rmipo_lite.ops.reference import IGNORED

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MODES = ("value", "direction", "recompute")
# Vocabularies: one token, fewer than a vector register, odd, more than one block of a row.
_VOCABULARIES = (1, 2, 7, 64, 97, 1000, 2049, 5003)
# (rows, vocabulary) that take several blocks of rows or of columns, and those of known models.
_LARGE = ((1100, 5000), (40, 128_256), (3, 151_936), (2, 256_000))
LAYOUTS = ("dense", "transposed", "padded rows", "every second column", "offset", "expanded")


def kernel_impl() -> Impl:
    """The kernels, or plain PyTorch where there are none."""
    return "native" if library.status("cpu").available else "torch"


def any_impl(rng: random.Random) -> Impl:
    """The kernels four times in five, else plain PyTorch."""
    return kernel_impl() if rng.random() < 0.8 else "torch"


def seeded(rng: random.Random) -> torch.Generator:
    """A torch generator that is the trial's own."""
    return torch.Generator().manual_seed(rng.getrandbits(48))


@dataclass
class HeadCase:
    """Arguments of one `linear_logps`, what is asked of it, and how it is described."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    target_ids: Tensor  # (N,)
    bias: Tensor | None  # (V,)
    logit_softcap: float | None
    logit_scale: float
    mode: str
    impl: Impl
    layout: str = "dense"

    def __str__(self) -> str:
        (rows, width), vocab = self.hidden.shape, self.weight.shape[0]
        dtype = str(self.hidden.dtype).removeprefix("torch.")
        bias = ", bias" if self.bias is not None else ""
        return (
            f"head {self.impl} {self.mode}, N={rows} H={width} V={vocab} {dtype}, {self.layout}, "
            f"scale {self.logit_scale:g}, softcap {self.logit_softcap}{bias}"
        )

    def logps(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The operator on these leaves."""
        return linear_logps(
            hidden,
            weight,
            self.target_ids,
            bias=bias,
            logit_softcap=self.logit_softcap,
            logit_scale=self.logit_scale,
            impl=self.impl,
        )

    def leaves(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Hidden, weight and bias with the gradients that the mode asks for."""
        head = self.mode == "recompute"
        hidden = self.hidden.detach().requires_grad_(self.mode != "value")
        weight = self.weight.detach().requires_grad_(head)
        bias = None if self.bias is None else self.bias.detach().requires_grad_(head)
        return hidden, weight, bias

    @property
    def rounds_logits(self) -> bool:
        """Whether the logits are what a bfloat16 product gives."""
        return (
            self.impl == "native"
            and self.mode != "recompute"
            and Blocks.of(self.hidden, self.weight).dtype == torch.bfloat16
        )

    def products(self) -> Tensor:
        """(N, V) float64: hidden @ weight.T of the inputs as they are rounded.

        Where the operator multiplies in bfloat16, the same rounded products, cut as it cuts them.
        """
        if not self.rounds_logits:
            return self.hidden.double() @ self.weight.double().T
        blocks = Blocks.of(self.hidden, self.weight)
        products = torch.empty(len(self.hidden), len(self.weight), dtype=torch.float64)
        for rows in blocks.row_ranges:
            for columns in blocks.column_ranges:
                dtype = blocks.dtype_of(columns)
                part = torch.mm(self.hidden[rows].to(dtype), self.weight[columns].to(dtype).T)
                products[rows, columns] = part.double()
        return products


def random_head(rng: random.Random, least_rows: int = 0) -> HeadCase:
    """A head of any shape, dtype, layout and mode."""
    generator = seeded(rng)
    dtype = rng.choice(DTYPES)
    if rng.random() < 0.04:
        rows, vocab = rng.choice(_LARGE)
        width = rng.choice((4, 8, 32))
    else:
        rows = max(least_rows, rng.choice((0, 1, 2, 3, 17, 40, 300)))
        vocab, width = rng.choice(_VOCABULARIES), rng.choice((1, 3, 16, 24, 32, 64))
    layout = rng.choice(LAYOUTS)
    spread = rng.choice((0.1, 1.0, 4.0))  # of the logits
    hidden = torch.randn(rows, width, generator=generator) * spread / width**0.5
    weight = torch.randn(vocab, width, generator=generator)
    ids = torch.randint(0, vocab, (rows,), generator=generator)
    share = rng.choice((0.0, 0.3, 1.0))  # of the rows that are ignored
    ids[torch.rand(rows, generator=generator) < share] = IGNORED
    bias = torch.randn(vocab, generator=generator) if rng.random() < 0.5 else None
    return HeadCase(
        hidden=laid_out(hidden.to(dtype), layout),
        weight=laid_out(weight.to(dtype), rng.choice(LAYOUTS)),
        target_ids=laid_out(ids, rng.choice(LAYOUTS[:5])),
        bias=None if bias is None else laid_out(bias.to(dtype), rng.choice(LAYOUTS[:5])),
        logit_softcap=rng.choice((None, None, 3.0, 30.0)),
        logit_scale=rng.choice((1.0, 1.0, 0.25, 2.0)),
        mode=rng.choice(MODES),
        impl=any_impl(rng),
        layout=layout,
    )


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values in other memory; "expanded" repeats the first row with stride 0."""
    if layout == "transposed" and values.dim() == 2:
        return values.T.contiguous().T
    if layout == "expanded" and values.dim() == 2 and len(values):
        return values[:1].expand(values.shape)
    if layout == "dense" or not values.numel():
        return values
    if layout == "offset":
        flat = values.new_zeros(values.numel() + 5)
        flat[5:] = values.reshape(-1)
        return flat[5:].view(values.shape)
    *lead, last = values.shape
    if layout == "padded rows":
        wide = values.new_zeros(*lead, last + 3)
        wide[..., 1 : last + 1] = values
        return wide[..., 1 : last + 1]
    wide = values.new_zeros(*lead, 2 * last)
    wide[..., ::2] = values
    return wide[..., ::2]


def ragged_borders(rng: random.Random, sequences: int, *, may_be_empty: bool) -> Tensor:
    """(sequences + 1,) int32: borders of sequences of very different lengths."""
    longest = rng.choice((1, 3, 12, 200))
    borders = [0]
    for _ in range(sequences):
        borders.append(borders[-1] + rng.randint(0 if may_be_empty else 1, longest))
    return torch.tensor(borders, dtype=torch.int32)
