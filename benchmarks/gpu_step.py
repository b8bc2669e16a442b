"""Whole training steps on a GPU against trl's SimPO, and what the budget takes on smaller cards.

Eight pairs a step, LoRA r=16, AdamW; random weights in the shapes of known models. Each contender
runs in a process of its own, since reserved memory is a process's. Ours is `RMiPOTrainer` as a user
runs it, with its automatic budget and the kernels or nothing; "ours simpo" is the same trainer with
SimPO's loss, which has no prior pass: the work that trl does. Of trl it is the loss of its
CPOTrainer under SimPO, backward and the optimizer's step, without what its Trainer adds, in the
largest micro-batch that fits and with or without checkpointing, whatever is fastest: more than its
defaults would give.

A case of ours that fails or runs padded fails the benchmark, after every row is out.

`rehearse` runs a tiny model, which measures nothing.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.cuda.memory import get_per_process_memory_fraction
from transformers import TrainerCallback

from benchmarks import peers
from benchmarks.authors import PaddedPairs, pad_pairs
from benchmarks.child import ask
from benchmarks.gpu_models import random_model
from benchmarks.inputs import Lengths
from benchmarks.peers import Absent
from benchmarks.records import Record
from benchmarks.rounds import summarize
from rmipo_lite.adapters.attach import attach_adapter
from rmipo_lite.config import RMiPOConfig
from rmipo_lite.demo.data import load_tokenizer
from rmipo_lite.model.backbone import disable_dropout, enable_checkpointing
from rmipo_lite.planning.budget import is_out_of_memory
from rmipo_lite.planning.estimation import estimate
from rmipo_lite.planning.footprint import setup_of
from rmipo_lite.tokens.pair import TokenizedPair
from rmipo_lite.training.trainer import RMiPOTrainer

SHORT, LONG = Lengths(200, 300, 274), Lengths(800, 1248, 1248)
BOTH = (SHORT, LONG)
TRL, LOSSES = "trl SimPO", {"ours": "rmipo", "ours simpo": "simpo"}


class Case(NamedTuple):
    """One process: who runs on which model, pairs of which lengths, on a card of how many GB."""

    impl: str
    model: str
    lengths: tuple[Lengths, ...]
    card: int | None = None  # None: the card as it is


# What matters most first: the time may not be enough for all.
CASES = (
    Case("ours", "Llama-3-8B", BOTH),
    Case(TRL, "Llama-3-8B", BOTH),
    Case("ours simpo", "Llama-3-8B", BOTH),
    Case("ours", "Llama-3-8B", (SHORT,), 8),
    Case("ours", "Llama-3-8B", (LONG,), 12),
    Case("ours", "Qwen2.5-0.5B", BOTH),
    Case(TRL, "Qwen2.5-0.5B", BOTH),
    Case("ours simpo", "Qwen2.5-0.5B", BOTH),
    Case("ours", "Qwen2.5-3B", BOTH),
    Case(TRL, "Qwen2.5-3B", BOTH),
    Case("ours", "Llama-3-8B", (LONG,), 16),
    Case("ours", "Qwen2.5-3B", (LONG,), 8),
)
REHEARSAL = tuple(Case(impl, "rehearsal", (Lengths(5, 7, 6),)) for impl in (*LOSSES, TRL))
PAIRS, WARM, STEPS = 8, 1, 3  # pairs of a step, steps before the clock, steps on it
BUDGET_S = 300.0  # of all cases together
_CONTEXT_GB = 0.5  # of a card, that the driver takes before anything runs
_LIMIT_S, _LEAST_S = 120.0, 20.0  # of one case: its most, and without which none is begun


class Measured(NamedTuple):
    """What a child says of one case."""

    seconds: list[float]  # of each step
    reserved: int  # peak, bytes
    note: str  # how it ran: micro-step, checkpointing
    estimated: int = 0  # bytes that `estimate` counts for our run, the driver's context left out
    padded: bool = False  # ours without its packed rows


def bench(rehearse: bool = False, seconds: float = BUDGET_S) -> Iterator[Record]:
    """Seconds, pairs per second and peak reserved memory of every case, and ours over trl's.

    Raises:
        RuntimeError: after the last row, where a case of ours failed or ran padded.
    """
    _forget_peak(torch.device("cpu" if rehearse else "cuda"))  # what this process held is theirs
    end = time.monotonic() + seconds
    found: dict[tuple[str, str, Lengths], Measured] = {}
    faults = []
    for case in REHEARSAL if rehearse else CASES:
        try:
            measured = _in_child(case, min(_LIMIT_S, end - time.monotonic()))
        except (Absent, subprocess.TimeoutExpired, RuntimeError) as reason:
            if case.impl in LOSSES and not isinstance(reason, Absent):
                faults.append(str(reason))
            for length in case.lengths:
                value = f"absent: {reason}"[:200]
                yield Record("gpu step", case.impl, _shape(case, length), "", "time", "s", value)
            continue
        for length, one in zip(case.lengths, measured, strict=True):
            yield from _rows(case.impl, f"{_shape(case, length)}, {one.note}", one)
            if one.padded:
                faults.append(f"{case.impl} on {_shape(case, length)} ran padded")
            if case.card is None:
                found[case.impl, case.model, length] = one
        for length in case.lengths if case.card is None else ():
            for impl in LOSSES if case.impl == TRL else (case.impl,):
                yield from _ratio(impl, case, length, found)
    if faults:
        raise RuntimeError(f"{len(faults)} of our cases are not what they should be: {faults}")


def _shape(case: Case, length: Lengths) -> str:
    card = "" if case.card is None else f", a card of {case.card} GB"
    return f"{case.model} {'/'.join(map(str, length))}{card}"


def _rows(impl: str, shape: str, case: Measured) -> Iterator[Record]:
    def row(metric: str, unit: str, values: Sequence[float]) -> Record:
        return Record("gpu step", impl, shape, "", metric, unit, *summarize(values))

    if not case.seconds:
        yield Record("gpu step", impl, shape, "", "time", "s", "absent: nothing fits")
        return
    yield row("time", "s", case.seconds)
    yield row("pairs per second", "1/s", [PAIRS / s for s in case.seconds])
    yield row("peak reserved", "GiB", [case.reserved / 2**30])
    if case.estimated:
        yield row("peak estimated", "GiB", [case.estimated / 2**30])


def _ratio(
    impl: str, case: Case, length: Lengths, found: dict[tuple[str, str, Lengths], Measured]
) -> Iterator[Record]:
    ours = found.get((impl, case.model, length))
    theirs = found.get((TRL, case.model, length))
    if ours is None or theirs is None or not theirs.seconds:
        return
    medians = [summarize(one.seconds).median for one in (ours, theirs)]
    for metric, value in (
        ("pairs per second over trl's", medians[1] / medians[0]),
        ("peak reserved over trl's", ours.reserved / max(theirs.reserved, 1)),
    ):
        yield Record("gpu step", impl, _shape(case, length), "", metric, "ratio", value)


def _in_child(case: Case, limit_s: float) -> list[Measured]:
    if limit_s < _LEAST_S:
        raise Absent("no time left")
    return [Measured(*one) for one in ask(__name__, case, f"{case.impl} on {case.model}", limit_s)]


# ---- in the child -----------------------------------------------------------------------------


def _measure(
    impl: str, name: str, lengths: Sequence[Lengths], card: int | None
) -> list[Measured] | str:
    """Every case of a contender, or why it can't run here."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if card is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction((card - _CONTEXT_GB) * 1e9 / total)
    try:
        run = _trl if impl == TRL else partial(_ours, loss_type=LOSSES[impl])
        measured = []
        for length in lengths:
            _forget_peak(device)  # and the model before
            model = attach_adapter(random_model(name, device), "new")
            measured.append(run(model, Lengths(*length), device))
            del model
        return measured
    except Absent as reason:
        return str(reason)


def _pairs(model: nn.Module, length: Lengths) -> list[TokenizedPair]:
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    vocab_size = embeddings.weight.shape[0]
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(3, vocab_size, (count,), generator=generator).tolist()

    return [TokenizedPair(i, *map(ids, length)) for i in range(PAIRS)]


class _Clock(TrainerCallback):
    """Seconds of every step, from its beginning until the device is done."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: list[float] = []

    def _wait(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start."""
        self.start = self._wait()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop."""
        self.seconds.append(self._wait() - self.start)


def _ours(
    model: nn.Module, length: Lengths, device: torch.device, loss_type: str = "rmipo"
) -> Measured:
    clock = _Clock(device)
    with tempfile.TemporaryDirectory() as folder:
        trainer = RMiPOTrainer(
            model,  # type: ignore[arg-type]
            RMiPOConfig(
                folder,
                loss_type=loss_type,
                length_balance="off",
                end_anchor=0.0,
                sft_weight=0.0,
                learning_rate=1e-5,
                kernel_impl="native",
                per_device_train_batch_size=PAIRS,
                num_train_epochs=WARM + STEPS,
                save_strategy="no",
                max_length=sum(length),
                disable_tqdm=True,
                logging_steps=1000,
            ),
            train_dataset=_pairs(model, length),
            processing_class=load_tokenizer(),
            callbacks=[clock],
        )
        _forget_peak(device)
        trainer.train()
        step = trainer.pair_step
    way = "packed" if step.packing else "padded"
    again = ", checkpointing" * step.checkpointing or ", checkpointing as needed" * bool(
        step.as_needed
    )
    fused = f", {len(step.fused_layers)} fused layers" if step.fused_layers else ""
    note = f"{way}, {step.max_tokens} tokens{again}{fused}"
    # What is counted is for a whole card, not for the share of it that plays a smaller one.
    estimated = _estimated(model, length) if _has_whole_card(device) else 0
    return Measured(clock.seconds[WARM:], _peak(device), note, estimated, not step.packing)


def _has_whole_card(device: torch.device) -> bool:
    return not (device.type == "cuda" and get_per_process_memory_fraction(device) < 1)


def _estimated(model: nn.Module, length: Lengths) -> int:
    """What is counted from the model's config for this machine, whole card."""
    setup = setup_of(model, torch.bfloat16)
    fit = estimate(
        model,
        _pairs(model, length),
        quantization="4bit" if setup.quantized else "none",
        per_device_train_batch_size=PAIRS,
        max_length=sum(length),
    ).fit
    return fit.peak - fit.parts["context"]


def _trl(model: nn.Module, length: Lengths, device: torch.device) -> Measured:
    """The fastest of trl's ways that fit; none at all is an empty list of seconds."""
    disable_dropout(model)
    simpo = peers.TrlSimpoStep(model.train(), load_tokenizer())
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    best: Measured | None = None
    for checkpointing in (False, True):
        if checkpointing:
            enable_checkpointing(model)
        for micro in (8, 4, 2, 1):
            parts = _padded(_pairs(model, length), micro, device)
            _forget_peak(device)
            try:
                seconds = _timed(lambda: _trl_step(simpo, parts, optimizer, device), device)  # noqa: B023
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                optimizer.zero_grad(set_to_none=True)
                continue
            note = f"{micro} pairs{', checkpointing' if checkpointing else ''}"
            case = Measured(seconds, _peak(device), note)
            if best is None or sum(case.seconds) < sum(best.seconds):
                best = case
            break  # smaller ones are slower
    return best or Measured([], 0, "nothing fits")


def _padded(pairs: list[TokenizedPair], micro: int, device: torch.device) -> list[PaddedPairs]:
    cut = [pairs[i : i + micro] for i in range(0, len(pairs), micro)]
    return [PaddedPairs(*(part.to(device) for part in pad_pairs(some))) for some in cut]


def _trl_step(
    simpo: peers.TrlSimpoStep,
    parts: Sequence[PaddedPairs],
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> None:
    optimizer.zero_grad(set_to_none=True)
    for part in parts:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss: Tensor = simpo(part) / len(parts)
        loss.backward()
    optimizer.step()


def _timed(step: Callable[[], None], device: torch.device) -> list[float]:
    clock = _Clock(device)
    for _ in range(WARM + STEPS):
        clock.on_step_begin()
        step()
        clock.on_step_end()
    return clock.seconds[WARM:]


def _forget_peak(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_reserved() if device.type == "cuda" else 0


if __name__ == "__main__":
    print(json.dumps(_measure(*json.loads(sys.argv[1]))))  # noqa: T201
