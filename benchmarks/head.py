"""The head alone: log-probs and the gradient of its input, against the floor and the peers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from benchmarks import inputs, peers
from benchmarks.floors import head_floor
from benchmarks.records import Record
from benchmarks.rounds import Run, interleave, ratios, summarize
from rmipo_lite.ops import linear_logps

VOCABULARIES, TOKENS = (32000, 131072), (512, 1024, 2048, 4096)
GROWING_VOCABULARIES, GROWING_TOKENS = (32000, 65536, 131072, 262144), (512, 2048, 8192, 16384)
_MOST_PEER_TOKENS = 1024  # above, full logits take gigabytes and the peers minutes
ROUNDS = 5


def _inputs(tokens: int, vocab_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, inputs.HIDDEN_SIZE, generator=generator).to(dtype)
    weight = torch.randn(vocab_size, inputs.HIDDEN_SIZE, generator=generator).mul_(0.05).to(dtype)
    return hidden, weight, torch.randint(0, vocab_size, (tokens,), generator=generator)


def contenders(
    tokens: int, vocab_size: int, dtype: torch.dtype
) -> tuple[dict[str, Run], dict[str, str]]:
    """Who runs here, by name, and who doesn't, with the reason."""
    hidden, weight, target_ids = _inputs(tokens, vocab_size, dtype)

    def logps_run(logps: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Run:
        def call() -> None:
            leaf = hidden.detach().requires_grad_()
            logps(leaf, weight, target_ids).sum().backward()

        return call

    def liger_run() -> Run:
        simpo = peers.liger_simpo()
        rows = hidden.view(2, tokens // 2, -1)  # one pair
        labels = target_ids.view(2, -1)

        def call() -> None:
            leaf = rows.detach().requires_grad_()
            simpo(leaf, weight, labels).backward()

        return call

    running: dict[str, Run] = {
        "ours": logps_run(linear_logps),
        "floor": lambda: head_floor(hidden, weight),
    }
    makers: dict[str, Callable[[], Run]] = {
        "trl chunked head": lambda: logps_run(peers.trl_logps()),
        "liger chunked SimPO": liger_run,
        "cut-cross-entropy": lambda: logps_run(peers.cut_cross_entropy_logps()),
    }
    if tokens > _MOST_PEER_TOKENS:
        return running, {}
    running["plain autograd"] = logps_run(peers.plain_logps)
    others, absent = peers.those_that_run(makers)
    return running | others, absent


def bench(rounds: int = ROUNDS) -> Iterator[Record]:
    """Time of every contender by tokens, vocabulary and dtype, and ours over the floor."""
    for name in inputs.DTYPES:
        for vocab_size in VOCABULARIES:
            for tokens in TOKENS:
                yield from _case(tokens, vocab_size, name, rounds)


def bench_quick() -> Iterator[Record]:
    """One small shape, one round."""
    return _case(512, 32000, "fp32", 1)


def bench_growth(rounds: int = 3) -> Iterator[Record]:
    """How ours grows: with the vocabulary at 1024 tokens, and with the tokens at 32k words."""
    shapes = [(1024, v) for v in GROWING_VOCABULARIES] + [(n, 32000) for n in GROWING_TOKENS]
    for name, dtype in inputs.DTYPES.items():
        for tokens, vocab_size in shapes:
            hidden, weight, target_ids = _inputs(tokens, vocab_size, dtype)

            def run(h: Tensor = hidden, w: Tensor = weight, t: Tensor = target_ids) -> None:
                linear_logps(h.detach().requires_grad_(), w, t).sum().backward()

            seconds = interleave({"ours": run}, rounds)["ours"]
            per_element = [s / (tokens * vocab_size) * 1e9 for s in seconds]
            yield _row("ours", tokens, vocab_size, name, "growth: time", "s", seconds)
            yield _row(
                "ours", tokens, vocab_size, name, "growth: time per logit", "ns", per_element
            )


def _case(tokens: int, vocab_size: int, dtype: str, rounds: int) -> Iterator[Record]:
    running, absent = contenders(tokens, vocab_size, inputs.DTYPES[dtype])
    seconds = interleave(running, rounds)
    for impl, times in seconds.items():
        yield _row(impl, tokens, vocab_size, dtype, "time", "s", times)
        if impl not in ("ours", "floor"):
            over = ratios(seconds["ours"], times)
            yield _row("ours", tokens, vocab_size, dtype, f"time over {impl}", "ratio", over)
    over = ratios(seconds["ours"], seconds["floor"])
    yield _row("ours", tokens, vocab_size, dtype, "time over floor", "ratio", over)
    for impl, reason in absent.items():
        shape = f"V={vocab_size} N={tokens}"
        yield Record("head", impl, shape, dtype, "time", "s", f"absent: {reason}")


def _row(
    impl: str, tokens: int, vocab: int, dtype: str, metric: str, unit: str, values: Sequence[float]
) -> Record:
    return Record("head", impl, f"V={vocab} N={tokens}", dtype, metric, unit, *summarize(values))
