"""The head with whole rows of logits, a chunk of rows at a time.

On CUDA, in plain PyTorch, and where the logits are computed again for a trained head. Logits are
float32 (float64 for float64) whatever the input. On CUDA the product itself gives them
(`out_dtype`); on the CPU, where it can't, the weight is cast a block of rows at a time.
"""

from functools import cached_property

import torch
from torch import Tensor

from rmipo_lite.ops import native, reference
from rmipo_lite.ops.devices import is_nvidia, is_trusted
from rmipo_lite.ops.head_blocks import CPU_BLOCK_BYTES, even_slices
from rmipo_lite.ops.reference import IGNORED, LogitTransform, accumulate_dtype

# On the CPU a chunk is as many rows as make about this many logits, within the range where a
# product still runs at full speed and the buffer stays small (128 MiB in float32). Below 128 rows
# the products lose a quarter of their speed; above 256 the first touch of a fresh buffer costs more
# than they gain.
_CHUNK_LOGITS = 2**25
_CHUNK_ROWS = (128, 256)
# On a GPU every chunk reads the whole weight, and the second product has a tile for every 128 rows
# and 256 columns of the hidden size: 64 tiles of 512 rows leave half of an H100's 132
# multiprocessors idle at H = 4096, 256 tiles of 2048 rows fill them twice. So more rows are better,
# up to what their logits and their derivative may take: this much, and this share of the card,
# larger where the card is (one sold with 24 GB has 22 GiB or more). A vocabulary so small that some
# hundred rows of it stay in the second-level cache is better read from there. A count, not yet
# measured on a card; `python -m benchmarks gpu` measures it.
_CARD_BYTES = 16 * 10**8
_CARD_SHARE, _LARGE_CARD_SHARE, _LARGE_CARD_BYTES = 1 / 40, 1 / 30, 22 * 2**30
_CARD_ROWS = (128, 2048)
_LEAST_CACHED_ROWS = 256
_CACHE_SHARE = 1 / 3  # the weight goes through the same cache
CPU_BUFFER_BYTES = 2 * CPU_BLOCK_BYTES  # a block of logits, and of the weight where it is cast
# Rows of the weight that are cast at a time on the CPU: 16 MiB in float32 at H = 512.
_BLOCK_ELEMENTS = 2**22
_MOST_SUMMED = 2**14  # where long sums aren't trusted
# Plain PyTorch keeps a chunk's logits and up to four more of their size on the way to a derivative.
_PLAIN_COPIES = 5
PLAIN_BUFFER_BYTES = _PLAIN_COPIES * 4 * _CHUNK_LOGITS  # in float32, elsewhere than on CUDA


def card_rows(row_bytes: int, cache_bytes: int, memory_bytes: int) -> int:
    """Rows of a chunk on a card, a multiple of a product's tile.

    Args:
        row_bytes: of one row's logits and their derivative.
        cache_bytes, memory_bytes: of the card's second-level cache and memory.
    """
    smallest, largest = _CARD_ROWS
    cached = int(_CACHE_SHARE * cache_bytes) // row_bytes // smallest * smallest
    if cached >= _LEAST_CACHED_ROWS:
        return min(cached, largest)
    share = _CARD_SHARE if memory_bytes < _LARGE_CARD_BYTES else _LARGE_CARD_SHARE
    room = int(min(_CARD_BYTES, share * memory_bytes))
    return min(max(room // row_bytes // smallest * smallest, smallest), largest)


def chunk_rows(weight: Tensor) -> int:
    """Rows of a chunk at most, for a head's weight (V, H)."""
    vocab_size = weight.shape[0]
    if weight.device.type == "cuda":
        card = torch.cuda.get_device_properties(weight.device)
        row_bytes = max(1, vocab_size) * _row_itemsize(weight)
        share = torch.cuda.memory.get_per_process_memory_fraction(weight.device)
        return card_rows(row_bytes, card.L2_cache_size, int(share * card.total_memory))
    smallest, largest = _CHUNK_ROWS
    return min(max(_CHUNK_LOGITS // max(1, vocab_size), smallest), largest)


def _row_itemsize(weight: Tensor) -> int:
    """Bytes of a logit in float32, and of its derivative where the weight is of 16 bits."""
    return weight.dtype.itemsize if weight.dtype.itemsize >= 4 else 6


def head_buffer_bytes(weight: Tensor, use_native: bool) -> int:
    """Bytes that `linear_logps` takes beside its arguments and its results.

    For a frozen head and a pass with gradients; a trained head takes more, on a card a pass without
    gradients less.
    """
    if not use_native:
        chunk = chunk_rows(weight) * weight.shape[0] * max(4, weight.dtype.itemsize)
        return _PLAIN_COPIES * chunk
    if weight.device.type == "cpu":
        return CPU_BUFFER_BYTES
    return chunk_rows(weight) * weight.shape[0] * _row_itemsize(weight)


def card_buffer_bytes(vocab_size: int, cache_bytes: int, memory_bytes: int) -> int:
    """The same for a 16-bit head on a card with such a second-level cache and memory."""
    row_bytes = 6 * vocab_size
    return card_rows(row_bytes, cache_bytes, memory_bytes) * row_bytes


class HeadProducts:
    """The matrix products of one call, with float32 results and buffers reused across chunks."""

    def __init__(self, hidden: Tensor, weight: Tensor) -> None:
        self.hidden, self.weight = hidden, weight
        self.exact = accumulate_dtype(hidden.dtype)
        low_precision = hidden.dtype != self.exact
        # ROCm's torch refuses the product of 16-bit numbers with a float32 result.
        self.mixed = low_precision and is_nvidia(hidden.device.type)
        self.cast = low_precision and not self.mixed
        self.chunks = even_slices(hidden.shape[0], chunk_rows(weight))
        rows = max((c.stop - c.start for c in self.chunks), default=0)
        self.buffer = hidden.new_empty((rows, weight.shape[0]), dtype=self.exact)
        self.slices = is_trusted(hidden.device.type)
        block = max(1, _BLOCK_ELEMENTS // max(hidden.shape[1], 1)) if self.cast else len(weight)
        block = block if self.slices else min(block, _MOST_SUMMED)
        self.blocks = [slice(i, min(i + block, len(weight))) for i in range(0, len(weight), block)]

    @property
    def in_one_read(self) -> bool:
        """Whether the derivative may be exponentials up to e^69, for which float16 has no room."""
        return self.mixed and self.weight.dtype == torch.bfloat16

    @cached_property
    def grads(self) -> Tensor:
        """Where a chunk's derivative goes; made on first use: a pass without gradients needs none.

        On CUDA the second product needs its operand in the weight's dtype; elsewhere the
        derivative overwrites the logits.
        """
        if not self.mixed:
            return self.buffer
        return torch.empty_like(self.buffer, dtype=self.weight.dtype)

    def logits(self, rows: slice) -> Tensor:
        """Rows of hidden @ weight.T, in the buffer that the next call overwrites."""
        hidden, out = self.hidden[rows], self.buffer[: rows.stop - rows.start]
        if self.mixed:
            return torch.mm(hidden, self.weight.T, out_dtype=self.exact, out=out)
        hidden = hidden.to(self.exact)
        for block in self.blocks:
            weight = self.weight[block].to(self.exact).T
            if self.slices:
                torch.mm(hidden, weight, out=out[:, block])
            else:
                out[:, block] = torch.mm(hidden, weight)
        return out

    def times_weight(self, grads: Tensor, out: Tensor) -> None:
        """Out (C, H) = grads (C, V) @ weight, in float32."""
        if self.mixed:
            torch.mm(grads, self.weight, out_dtype=self.exact, out=out)
            return
        out.zero_()
        for block in self.blocks:
            weight = self.weight[block].to(self.exact)
            if self.slices:
                out.addmm_(grads[:, block], weight)
            else:
                out += torch.mm(grads[:, block].contiguous(), weight)

    def add_weight_grad(self, grads: Tensor, rows: slice, target_ids: Tensor, out: Tensor) -> None:
        """Out (V, H) += grads.T @ hidden, in float32, over the rows that aren't ignored.

        Their derivative is zero, but 0 * NaN would be NaN in every weight.
        """
        hidden = self.hidden[rows].masked_fill((target_ids[rows] == IGNORED)[:, None], 0.0)
        if self.mixed:
            torch.addmm(out, grads.T, hidden, out_dtype=self.exact, out=out)
        else:
            out.addmm_(grads.T, hidden.to(self.exact))


def row_work(
    head: HeadProducts,
    rows: slice,
    target_ids: Tensor,
    transform: LogitTransform,
    row_scale: Tensor | None,
    use_native: bool,
    with_grads: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Log-probs of a chunk and, on demand, their derivative with respect to the product.

    Where the third isn't None the derivative is the second times it, row by row.
    """
    logits = head.logits(rows)
    scale = None if row_scale is None else row_scale[rows]
    if use_native:
        grads = head.grads[: rows.stop - rows.start] if with_grads else None
        if grads is not None and scale is None and head.in_one_read:
            logps, factors = native.row_exponentials(logits, target_ids[rows], transform, grads)
            return logps, grads, factors
        return native.row_logps(logits, target_ids[rows], transform, scale, grads), grads, None
    logps, exact_grads, invalid = reference.row_logps(
        logits, target_ids[rows], transform, scale, with_grads=with_grads
    )
    if logits.device.type != "cpu":
        native.device_flag(logits.device).bitwise_or_(invalid.to(torch.int32))
    dtype = head.weight.dtype if head.mixed else head.exact
    return logps, None if exact_grads is None else exact_grads.to(dtype), None
