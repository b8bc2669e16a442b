"""The head on a GPU, at the sizes of an 8B model: time, memory and error, and what chunk is best.

Ours is the kernels or nothing (`impl="native"`): plain PyTorch never passes for them. Without a GPU
(`rehearse`) the same lines run on the CPU at a small shape, which measures nothing and finds what
would fail on the card.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.records import Record
from benchmarks.rounds import Run, interleave, ratios, summarize
from rmipo_lite.ops import head_rows, linear_logps, native
from rmipo_lite.ops.head_rows import HeadProducts, row_work
from rmipo_lite.ops.reference import LogitTransform

ROUNDS = 7
CHUNK_ROWS = (256, 512, 1024, 2048, 4096)
_UNCHUNKED_ROWS = 2048  # of a floor that shares no chunk with ours: a bad one would slow both
_CHECKED_ROWS = 128  # whose error is measured: their float64 logits are held at once

our_logps = partial(linear_logps, impl="native")


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
    """Ours against the bare products and plain autograd, its error, its memory, its chunks."""
    for case, rounds in _cases(rehearse):
        running, absent = case.with_ours(case.plain_makers())
        running["floor"] = case.floor()
        yield from case.times(running, absent, rounds)
        yield from case.errors()
        if not rehearse:
            yield from case.memory(running)
        yield from case.chunks(rounds)


def bench_peers(rehearse: bool = False) -> Iterator[Record]:
    """Ours against other packages, some of which compile their kernels first."""
    for case, rounds in _cases(rehearse):
        running, absent = case.with_ours(case.peer_makers())
        yield from case.times(running, absent, rounds, without=("ours",))  # `bench` has its own
        if not rehearse:
            yield from case.memory(running, without=("ours",))


def _cases(rehearse: bool) -> Iterator[tuple[Case, int]]:
    device = torch.device("cpu" if rehearse else "cuda")
    for shape in (REHEARSAL,) if rehearse else SHAPES:
        yield Case(shape, device), 1 if rehearse else ROUNDS


class Case:
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

    def absent(self, impl: str, metric: str, reason: str) -> Record:
        return Record("gpu", impl, str(self.shape), "bf16", metric, "s", f"absent: {reason}")

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

    def floor(self) -> Callable[[], Tensor]:
        """The two bare products, in the chunks and with the results that ours has.

        The second one reads derivatives that ours computed, since zeros or what memory happens to
        hold run faster. They and the buffers are made here, before the clock.
        """
        head = HeadProducts(self.hidden, self.weight)
        out = self.hidden.new_empty(self.hidden.shape, dtype=head.exact)
        longest = max(head.chunks, key=lambda rows: rows.stop - rows.start)
        kernels = native.use_native("native", self.device)
        _, grads, _ = row_work(
            head, longest, self.target_ids, LogitTransform(), None, kernels, True
        )
        assert grads is not None
        derivatives = grads.clone()  # on the CPU the next product overwrites them

        def call() -> Tensor:
            for rows in head.chunks:
                head.logits(rows)
                head.times_weight(derivatives[: rows.stop - rows.start], out[rows])
            return out

        return call

    def unchunked_floor(self) -> Run:
        """The same products over all tokens, cut only where their logits would take gigabytes."""
        with chunks_of(_UNCHUNKED_ROWS):
            return self.floor()

    def with_ours(
        self, makers: Mapping[str, Callable[[], Run]]
    ) -> tuple[dict[str, Run], dict[str, str]]:
        """Who runs, by name, and who doesn't, with the reason; that ours can't is an error."""
        run = self.logps_run(our_logps)
        run()
        others, absent = peers.those_that_run(makers)
        return {"ours": run, **others}, absent

    def plain_makers(self) -> dict[str, Callable[[], Run]]:
        return {
            "unchunked floor": self.unchunked_floor,
            "plain autograd": lambda: self.logps_run(peers.plain_logps),
        }

    def peer_makers(self) -> dict[str, Callable[[], Run]]:
        return {
            "trl chunked head": lambda: self.logps_run(peers.trl_logps()),
            "liger chunked SimPO": self.liger_run,
            "cut-cross-entropy": lambda: self.logps_run(peers.cut_cross_entropy_logps()),
        }

    # ---- what is measured ---------------------------------------------------------------------

    def times(
        self,
        running: Mapping[str, Run],
        absent: Mapping[str, str],
        rounds: int,
        without: Sequence[str] = (),
    ) -> Iterator[Record]:
        """Seconds of everybody, and ours over each of them."""
        seconds = interleave(running, rounds)
        for impl, values in seconds.items():
            if impl not in without:
                yield self.row(impl, "time", "s", values)
            if impl != "ours":
                over = ratios(seconds["ours"], values)
                yield self.row("ours", f"time over {impl}", "ratio", over)
        for impl, reason in absent.items():
            yield self.absent(impl, "time", reason)

    def errors(self) -> Iterator[Record]:
        """Largest error of a log-prob against float64, ours and that of full float32 logits."""
        hidden, ids = self.hidden[:_CHECKED_ROWS], self.target_ids[:_CHECKED_ROWS]
        exact = peers.plain_logps(hidden.double(), self.weight.double(), ids)
        with torch.no_grad():
            found = {
                "ours": our_logps(hidden, self.weight, ids),
                "float32 logits": peers.plain_logps(hidden.float(), self.weight.float(), ids),
                "plain autograd": peers.plain_logps(hidden, self.weight, ids),
            }
        for impl, logps in found.items():
            error = (logps.double() - exact).abs().max().item()
            yield self.row(impl, "largest error of a log-prob", "nats", [error])

    def memory(
        self, running: Mapping[str, Run], without: Sequence[str] = ("floor", "unchunked floor")
    ) -> Iterator[Record]:
        """Peak beyond the inputs, and ours beyond its N x H results too."""
        results = self.hidden.numel() * (4 + self.hidden.element_size())  # u and the gradient
        for impl, run in running.items():
            if impl in without:
                continue
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
        for rows in CHUNK_ROWS:
            metric = f"time in chunks of {rows} rows"
            with chunks_of(rows):
                makers = {"ours": lambda: self.logps_run(our_logps), "floor": self.floor}
                running, absent = peers.those_that_run(makers)
                for impl, values in interleave(running, rounds).items():
                    yield self.row(impl, metric, "s", values)
            for impl, reason in absent.items():  # a small card's memory
                yield self.absent(impl, metric, reason)


@contextmanager
def chunks_of(rows: int) -> Iterator[None]:
    """Let the head cut its tokens into chunks of so many rows."""
    usual = head_rows.chunk_rows
    head_rows.chunk_rows = partial(_always, rows)
    try:
        yield
    finally:
        head_rows.chunk_rows = usual


def _always(rows: int, weight: Tensor) -> int:
    return rows
