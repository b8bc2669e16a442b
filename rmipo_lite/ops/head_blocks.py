"""The head on the CPU, a block of the vocabulary at a time (online softmax).

For every row the kernel keeps the running maximum m and the sum of exponentials, and turns a block
of logits z into exp(z - m) in place; the second product adds exp(z - m) @ W_block to the row's
direction, which the kernel rescales whenever the maximum rises. At the end

    logp_t = z_y - m - log(sum)
    u_t = (1 - p_y) * W_y - (sum over v != y of exp(z_v - m) * W_v) / sum

A block is small enough to stay in the cache between its two products, and both products run with
many more rows than whole rows of logits would leave memory for. Where the CPU multiplies bfloat16
itself the products are bfloat16's: logits are rounded to it, as with any bfloat16 head on a CPU,
and so is each block's share of a direction; sums, log-probs and the accumulated directions are
float32. Else 16-bit blocks of the weight are cast, once for both products.

A bfloat16 product sums over a multiple of 32 elements: with another number oneDNN reads on into the
next row and multiplies what it finds by zero, so that a NaN there becomes one here (measured with
AMX). An odd width, and the last columns of a vocabulary, are therefore multiplied in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from rmipo_lite.ops import native
from rmipo_lite.ops.devices import x86_has_bf16
from rmipo_lite.ops.reference import IGNORED, LogitTransform, accumulate_dtype

# Measured on two Sapphire Rapids cores: both products of 1024 rows by 4096 columns run 13 % (fp32)
# and 18 % (bf16) faster than those of 256 rows by 32k. Fewer rows take more columns.
_MOST_ROWS, CPU_BLOCK_BYTES = 1024, 2**24
# What bfloat16 products sum over, elements: the length of a tile's row.
_TILE = 32
# bfloat16's second product runs fastest 256 rows at a time (oneDNN's choice of kernel).
_BF16_SECOND_ROWS = 256


@cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU has bfloat16 matrix arithmetic, so that casting to float32 would not pay."""
    return x86_has_bf16() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def even_slices(count: int, most: int) -> list[slice]:
    """0 .. count in the fewest ranges of at most `most`, nearly equal in size."""
    parts = -(-count // most)
    return [slice(count * i // parts, count * (i + 1) // parts) for i in range(parts)]


def _tiled_slices(count: int, most: int, tile: int) -> list[slice]:
    """As `even_slices`, in multiples of `tile`, and what is left of them at the end."""
    whole = count // tile
    parts = even_slices(whole, max(1, most // tile))
    ranges = [slice(part.start * tile, part.stop * tile) for part in parts]
    return ranges + ([slice(whole * tile, count)] if count % tile else [])


@dataclass(frozen=True)
class Blocks:
    """How a head's products are cut: ranges of rows and of vocabulary columns."""

    row_ranges: list[slice]
    column_ranges: list[slice]
    second_rows: int  # rows of the second product at a time
    dtype: torch.dtype  # of the products' operands, save in a last range that is no multiple of 32
    exact: torch.dtype  # of the operands there, and of sums

    @staticmethod
    def of(hidden: Tensor, weight: Tensor) -> Blocks:
        """The blocks for hidden (N, H) and weight (V, H)."""
        exact = accumulate_dtype(hidden.dtype)
        low_precision = (
            hidden.dtype == torch.bfloat16
            and multiplies_bfloat16()
            and hidden.shape[1] % _TILE == 0
        )
        dtype = torch.bfloat16 if low_precision else exact
        row_ranges = even_slices(hidden.shape[0], _MOST_ROWS)
        rows = max((r.stop - r.start for r in row_ranges), default=1)
        columns = max(1, CPU_BLOCK_BYTES // (rows * dtype.itemsize))
        if dtype != weight.dtype:  # a block of the weight is cast, and that copy stays small too
            row_bytes = max(1, weight.shape[1]) * dtype.itemsize
            columns = min(columns, max(1, CPU_BLOCK_BYTES // row_bytes))
        return Blocks(
            row_ranges=row_ranges,
            column_ranges=_tiled_slices(weight.shape[0], columns, _TILE if low_precision else 1),
            second_rows=_BF16_SECOND_ROWS if low_precision else _MOST_ROWS,
            dtype=dtype,
            exact=exact,
        )

    def dtype_of(self, columns: slice) -> torch.dtype:
        """Of the products' operands for a range of columns."""
        tiled = (columns.stop - columns.start) % _TILE == 0
        return self.dtype if self.dtype != torch.bfloat16 or tiled else self.exact

    @property
    def most_rows(self) -> int:
        """Rows of the largest block."""
        return max((rows.stop - rows.start for rows in self.row_ranges), default=0)

    @property
    def most_columns(self) -> int:
        """Columns of the largest block."""
        return max(columns.stop - columns.start for columns in self.column_ranges)

    def second_ranges(self, rows: int) -> list[slice]:
        """Ranges of the second product within a block of rows."""
        return even_slices(rows, self.second_rows)


def blocked_logps(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    transform: LogitTransform,
    with_directions: bool,
) -> tuple[Tensor, Tensor]:
    """Logps (N,) and directions (N, H), or (0, H) without; ids are checked by the caller."""
    blocks = Blocks.of(hidden, weight)
    exact = blocks.exact
    num_rows, width = hidden.shape
    logps = hidden.new_empty(num_rows, dtype=exact)
    directions = hidden.new_zeros((num_rows if with_directions else 0, width), dtype=exact)
    buffer = hidden.new_empty(blocks.most_rows * blocks.most_columns, dtype=blocks.dtype)
    for rows in blocks.row_ranges:
        out = directions[rows] if with_directions else None
        sums = _Sums(target_ids[rows], exact)
        chunk = hidden[rows].to(blocks.dtype)
        for columns in blocks.column_ranges:
            dtype = blocks.dtype_of(columns)
            weight_block = weight[columns].to(dtype)
            shape = (len(chunk), len(weight_block))
            logits = buffer[: shape[0] * shape[1]].view(shape)
            if dtype != blocks.dtype:  # the few columns that are left at the end
                logits = hidden.new_empty(shape, dtype=dtype)
            torch.mm(chunk.to(dtype), weight_block.T, out=logits)
            bias = transform.bias
            some = None if bias is None else bias[columns].to(dtype).contiguous()
            sums.fold(logits, columns.start, transform._replace(bias=some), out)
            if out is not None:
                _add_product(out, logits, weight_block, blocks)
        sums.close()
        logps[rows] = sums.logps()
        if out is not None:
            sums.finish(out, weight, transform)
    return logps, directions


def _add_product(out: Tensor, exponentials: Tensor, weight_block: Tensor, blocks: Blocks) -> None:
    """Out (C, H) += exponentials (C, B) @ weight_block (B, H), accumulated in out's dtype."""
    if out.dtype == weight_block.dtype:
        out.addmm_(exponentials, weight_block)
        return
    for part in blocks.second_ranges(len(out)):
        out[part] += torch.mm(exponentials[part], weight_block)


class _Sums:
    """What is known of a block of rows from the columns seen so far."""

    def __init__(self, target_ids: Tensor, exact: torch.dtype) -> None:
        self.target_ids = target_ids.contiguous()
        count = len(target_ids)
        self.max = torch.full((count,), -torch.inf, dtype=exact)
        self.others = torch.zeros(count, dtype=torch.float64)  # without the target
        self.target_logit = torch.full((count,), torch.nan, dtype=exact)

    def fold(
        self,
        logits: Tensor,
        first_id: int,
        transform: LogitTransform,  # its bias that of these columns
        directions: Tensor | None,
    ) -> None:
        """Take in a block of logits, which becomes its exponentials where directions are wanted."""
        native.fold_logits(
            logits,
            self.target_ids,
            first_id,
            transform,
            self.max,
            self.others,
            self.target_logit,
            directions,
        )

    def close(self) -> None:
        """After the last block: the sum over all tokens, and which rows count."""
        self.log_target = (self.target_logit - self.max).double()
        self.total = torch.exp(self.log_target) + self.others
        self.ignored = self.target_ids == IGNORED

    def logps(self) -> Tensor:
        """Log-probability of each row's target, 0 where ignored."""
        logps = self.log_target - torch.log(self.total)
        return logps.masked_fill_(self.ignored, 0.0).to(self.max.dtype)

    def finish(self, out: Tensor, weight: Tensor, transform: LogitTransform) -> None:
        """Turn the summed exponentials times weight into the directions, in place."""
        slope = torch.full_like(self.total, transform.scale)
        if transform.softcap is not None:
            slope *= 1 - (self.target_logit.double() / transform.softcap) ** 2
        of_target = (slope * self.others / self.total).masked_fill_(self.ignored, 0.0)
        of_others = (-transform.scale / self.total).masked_fill_(self.ignored, 0.0)
        out.mul_(of_others.to(out.dtype)[:, None])
        rows = weight.index_select(0, self.target_ids.clamp(min=0)).to(out.dtype)
        out.addcmul_(rows, of_target.to(out.dtype)[:, None])
