"""The head on a GPU, at the sizes of an 8B model: time, memory and error, and what chunk is best.

Without a GPU (`rehearse`) the same lines run on the CPU at a small shape, which measures nothing
and finds what would fail on the card.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.records import Record
from benchmarks.rounds import Run, interleave, ratios, summarize
from rmipo_lite.ops import head_rows, linear_logps
from rmipo_lite.ops.head_rows import HeadProducts

ROUNDS = 7
CHUNK_ROWS = (128, 256, 384, 512, 1024)
_CHECKED_ROWS = 128  # whose error is measured: their float64 logits are held at once


class Shape(NamedTuple):
    """Scored tokens, hidden size, vocabulary."""

    tokens: int
    hidden_size: int
    vocab_size: int

    def __str__(self) -> str:
        return f"N={self.tokens} H={self.hidden_size} V={self.vocab_size}"


SHAPES = (Shape(4096, 4096, 128256), Shape(4096, 2048, 151936), Shape(2048, 896, 151936))
REHEARSAL = Shape(64, 32, 1001)


def bench(rehearse: bool = False) -> Iterator[Record]:
    """Every contender on every shape; the chunk sizes on the first."""
    device = torch.device("cpu" if rehearse else "cuda")
    rounds = 1 if rehearse else ROUNDS
    for index, shape in enumerate((REHEARSAL,) if rehearse else SHAPES):
        case = _Case(shape, device)
        yield from case.times(rounds)
        yield from case.errors()
        if not rehearse:
            yield from case.memory()
        if index == 0:
            yield from case.chunks(rounds)
        del case


class _Case:
    """One shape's inputs and who runs on them."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def draw(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device=device, dtype=torch.bfloat16)

        self.shape, self.device = shape, device
        self.hidden = draw(shape.tokens, shape.hidden_size)
        self.weight = draw(shape.vocab_size, shape.hidden_size).mul_(shape.hidden_size**-0.5)
        self.target_ids = torch.randint(
            shape.vocab_size, (shape.tokens,), generator=generator, device=device
        )

    def row(self, impl: str, metric: str, unit: str, values: Sequence[float]) -> Record:
        return Record("gpu", impl, str(self.shape), "bf16", metric, unit, *summarize(values))

    # ---- who runs -----------------------------------------------------------------------------

    def logps_run(self, logps: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Run:
        def call() -> None:
            leaf = self.hidden.detach().requires_grad_()
            logps(leaf, self.weight, self.target_ids).sum().backward()

        return call

    def liger_run(self) -> Run:
        simpo = peers.liger_simpo(compiled=self.device.type == "cuda")
        rows = self.hidden.view(2, self.shape.tokens // 2, -1)  # one pair
        labels = self.target_ids.view(2, -1)

        def call() -> None:
            leaf = rows.detach().requires_grad_()
            simpo(leaf, self.weight, labels).backward()

        return call

    def floor(self) -> None:
        """The two bare products, in the chunks and with the results that ours has."""
        head = HeadProducts(self.hidden, self.weight)
        out = self.hidden.new_empty(self.hidden.shape, dtype=head.exact)
        for rows in head.chunks:
            head.logits(rows)
            head.times_weight(head.grads[: rows.stop - rows.start], out[rows])

    def contenders(self) -> tuple[dict[str, Run], dict[str, str]]:
        """Who runs, by name, and who doesn't, with the reason."""
        running: dict[str, Run] = {"ours": self.logps_run(linear_logps), "floor": self.floor}
        makers: dict[str, Callable[[], Run]] = {
            "plain autograd": lambda: self.logps_run(peers.plain_logps),
            "trl chunked head": lambda: self.logps_run(peers.trl_logps()),
            "liger chunked SimPO": self.liger_run,
            "cut-cross-entropy": lambda: self.logps_run(peers.cut_cross_entropy_logps()),
        }
        others, absent = peers.those_that_run(makers)
        return running | others, absent

    # ---- what is measured ---------------------------------------------------------------------

    def times(self, rounds: int) -> Iterator[Record]:
        """Seconds of everybody, and ours over each of them."""
        running, absent = self.contenders()
        seconds = interleave(running, rounds)
        for impl, values in seconds.items():
            yield self.row(impl, "time", "s", values)
            if impl != "ours":
                over = ratios(seconds["ours"], values)
                yield self.row("ours", f"time over {impl}", "ratio", over)
        for impl, reason in absent.items():
            yield Record("gpu", impl, str(self.shape), "bf16", "time", "s", f"absent: {reason}")

    def errors(self) -> Iterator[Record]:
        """Largest error of a log-prob against float64, ours and that of full float32 logits."""
        hidden, ids = self.hidden[:_CHECKED_ROWS], self.target_ids[:_CHECKED_ROWS]
        exact = peers.plain_logps(hidden.double(), self.weight.double(), ids)
        with torch.no_grad():
            found = {
                "ours": linear_logps(hidden, self.weight, ids),
                "float32 logits": peers.plain_logps(hidden.float(), self.weight.float(), ids),
                "plain autograd": peers.plain_logps(hidden, self.weight, ids),
            }
        for impl, logps in found.items():
            error = (logps.double() - exact).abs().max().item()
            yield self.row(impl, "largest error of a log-prob", "nats", [error])

    def memory(self) -> Iterator[Record]:
        """Peak beyond the inputs, and ours beyond its N x H results too."""
        running, _ = self.contenders()
        results = self.hidden.numel() * (4 + self.hidden.element_size())  # u and the gradient
        for impl, run in running.items():
            base = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            run()
            peak = torch.cuda.max_memory_allocated() - base
            yield self.row(impl, "peak beyond the inputs", "MiB", [peak / 2**20])
            if impl == "ours":
                extra = (peak - results) / 2**20
                yield self.row(impl, "peak beyond inputs and N x H results", "MiB", [extra])

    def chunks(self, rounds: int) -> Iterator[Record]:
        """Ours and the floor by rows of a chunk: what to take on this card."""
        usual = head_rows.chunk_rows
        try:
            for rows in CHUNK_ROWS:
                head_rows.chunk_rows = partial(_always, rows)
                runs = {"ours": self.logps_run(linear_logps), "floor": self.floor}
                for impl, values in interleave(runs, rounds).items():
                    yield self.row(impl, f"time in chunks of {rows} rows", "s", values)
        finally:
            head_rows.chunk_rows = usual


def _always(rows: int, weight: Tensor) -> int:
    return rows
