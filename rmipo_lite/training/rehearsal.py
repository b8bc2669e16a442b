"""Before the first step: what the run will take. Measured on its own pairs rather than guessed.

The largest micro-step that the run will have is computed once, forward and backward, and thrown
away: where memory runs out it does so now and not after hours, its peak is the run's, and its pace
is the run's too. The measurement takes at most a twentieth of the work of the run; what a short run
has no room for isn't measured. Disk is counted from what a checkpoint holds. Random numbers and
weights stay as they were.
"""

import math
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from peft import PeftModel

from rmipo_lite.checkpoints.random_state import kept_random_state
from rmipo_lite.model import batch
from rmipo_lite.model.backbone import device_of
from rmipo_lite.output.console import duration, size
from rmipo_lite.planning.device import PeakMemory
from rmipo_lite.planning.footprint import optimizer_width
from rmipo_lite.tokens.pair import TokenizedPair
from rmipo_lite.training.learning_rate import SEARCH_STEPS, pairs_of_a_search
from rmipo_lite.training.trainer import RMiPOTrainer
from rmipo_lite.watch.progress import phase

_SHARE = 0.05  # of the run's work, which measuring it may take
_LEAST_PAIRS = 4  # that a pace is read from
_LONG_CPU_RUN_S = 1800.0
# On a CPU the heap goes on growing after the first steps: runs of 24 steps on five small models
# took 29 to 39 % more than their largest micro-step alone.
_CPU_GROWTH = 1.33
# Beside tensors and tokenizer a checkpoint holds the state of three random generators and options
# (bytes), and for every trained weight its name in four files.
_FIXED_FILE_BYTES = 38_000
_BYTES_PER_NAME = 420


@dataclass(frozen=True)
class Plan:
    """What a run takes. Sizes in bytes; None where it was not measured.

    Attributes:
        steps: optimizer steps of the whole run.
        done: steps that a resumed run has behind it.
        pairs_per_step: pairs of each.
        micro_step_tokens: tokens of the largest micro-step.
        seconds: what is left of the training loop, evaluation and saves included.
        memory: peak above what model and data take, optimizer included.
        disk: what the run's folder holds at most.
        free_disk: what is free there now.
        checkpointing: whose activations are computed again in the backward pass: "", "all", or
            "long" micro-steps'.
        searches: whether a learning rate is looked for before the first step.
    """

    steps: int
    pairs_per_step: int
    micro_step_tokens: int
    checkpointing: Literal["", "all", "long"]
    on_cpu: bool
    disk: int
    free_disk: int
    seconds: float | None = None
    memory: int | None = None
    searches: bool = False
    done: int = 0

    @property
    def left(self) -> int:
        """Steps that are still to do."""
        return max(0, self.steps - self.done)

    def __str__(self) -> str:
        parts = [f"Plan: {self.steps} steps of {self.pairs_per_step} pairs"]
        if self.done:
            parts[0] = (
                f"Plan: {self.left} of {self.steps} steps of {self.pairs_per_step} pairs are left"
            )
        if self.searches:
            parts.append(f"some {SEARCH_STEPS} more before them to find the learning rate")
        if self.seconds is not None:
            parts.append(f"about {duration(self.seconds)}")
        parts.append(f"micro-steps of up to {self.micro_step_tokens} tokens")
        if self.checkpointing:
            whose = (
                "activations of the longest ones" if self.checkpointing == "long" else "activations"
            )
            parts.append(f"{whose} computed again in the backward pass")
        if self.memory is not None:
            parts.append(f"{size(self.memory)} of memory beside the model")
        parts.append(f"{size(self.disk)} on disk ({size(self.free_disk)} free)")
        return ", ".join(parts)

    @property
    def warnings(self) -> list[str]:
        """What to think about before the run begins."""
        lines = []
        if self.disk > self.free_disk:
            lines.append(
                f"WARNING: checkpoints and adapter need {size(self.disk)} and "
                f"{size(self.free_disk)} are free: some saves will fail. Make room, or lower "
                "save_total_limit"
            )
        if self.on_cpu and self.seconds is not None and self.seconds > _LONG_CPU_RUN_S:
            lines.append(
                f"WARNING: this runs on the CPU, for about {duration(self.seconds)}. A GPU, fewer "
                "max_steps or a smaller model are the ways out; Ctrl-C stops and saves"
            )
        return lines


def plan_run(trainer: RMiPOTrainer, eval_seconds: float = 0.0, *, done: int | None = None) -> Plan:
    """What the trainer's run will take; `eval_seconds` is what one evaluation took.

    `done` are the steps of the checkpoint that a resumed run goes on from. It has its learning rate
    from there too, and searches for none.
    """
    args = trainer.args
    steps = trainer.run_steps()
    size = args.pairs_per_step
    left = max(0, steps - (done or 0))
    coming = _coming_steps(trainer, left)
    largest = max(
        (_largest_part(trainer, pairs) for pairs in coming), key=lambda part: _work(trainer, part)
    )
    searches = trainer.learning_rate is None and done is None
    search = pairs_of_a_search(size) / size if searches else 0.0
    seconds = memory = None
    with kept_random_state():
        measured = _measure(trainer, largest, coming, left + search)
    if measured is not None:
        pace, memory = measured
        work = statistics.mean(_work(trainer, pairs) for pairs in coming)
        step_seconds = pace * work / trainer.pair_step.group.size
        evaluations = _times(args.eval_strategy, args.eval_steps, trainer, left)
        seconds = (left + search) * step_seconds + evaluations * eval_seconds
    disk, folder = _disk(trainer, steps), _nearest_folder(Path(str(args.output_dir)))
    return Plan(
        steps=steps,
        pairs_per_step=size,
        micro_step_tokens=_work(trainer, largest),
        checkpointing=_checkpointing(trainer, largest),
        on_cpu=device_of(trainer.model).type == "cpu",
        disk=disk,
        free_disk=shutil.disk_usage(folder).free,
        seconds=seconds,
        memory=memory,
        searches=searches,
        done=done or 0,
    )


def _checkpointing(
    trainer: RMiPOTrainer, largest: Sequence[TokenizedPair]
) -> Literal["", "all", "long"]:
    step = trainer.pair_step
    if step.checkpointing:
        return "all"
    return "long" if step.as_needed and step.layers_again(largest) else ""


def _times(strategy: object, every: float | None, trainer: RMiPOTrainer, steps: int) -> int:
    """How often something happens that a strategy asks for."""
    kind = str(getattr(strategy, "value", strategy))
    if kind == "steps" and every:
        return math.ceil(steps / (every if every >= 1 else max(1, every * steps)))
    if kind == "epoch":
        pairs = len(cast(list[TokenizedPair], trainer.train_dataset))
        return math.ceil(steps / trainer.args.steps_of_an_epoch(pairs))
    return 0


def _run_once(trainer: RMiPOTrainer, pairs: Sequence[TokenizedPair]) -> None:
    """A step's forward and backward passes; its gradients are thrown away."""
    trainer.model.train()
    try:
        with trainer.pair_step.put_back(), trainer.pair_step.alone():
            trainer.pair_step.train(pairs, trainer.accelerator.backward)
        device = device_of(trainer.model)
        if device.type != "cpu":
            torch.get_device_module(device).synchronize()
    finally:
        trainer.model.zero_grad(set_to_none=True)


def _timed(trainer: RMiPOTrainer, pairs: Sequence[TokenizedPair]) -> float:
    start = time.perf_counter()
    _run_once(trainer, pairs)
    return time.perf_counter() - start


def _coming_steps(trainer: RMiPOTrainer, steps: int) -> list[list[TokenizedPair]]:
    """The pairs of the run's steps, in its own order, as far as an epoch goes."""
    with kept_random_state():
        loader = trainer.get_train_dataloader()
        trainer.accelerator._dataloaders.remove(loader)  # the run's own comes later
        batches = iter(loader)
        found: list[list[TokenizedPair]] = []
        pairs: list[TokenizedPair] = []
        for number, inputs in enumerate(batches, start=1):
            pairs += inputs["pairs"]
            if number % trainer.args.gradient_accumulation_steps == 0:
                found.append(pairs)
                pairs = []
            if len(found) >= max(1, steps):
                break
    return found or [pairs]


def _work(trainer: RMiPOTrainer, pairs: Sequence[TokenizedPair]) -> int:
    """Tokens that pairs take, which their time goes by."""
    return batch.micro_step_tokens(pairs, trainer.pair_step.packing)


def _largest_part(trainer: RMiPOTrainer, pairs: Sequence[TokenizedPair]) -> list[TokenizedPair]:
    """The micro-step of these pairs that takes most."""
    step = trainer.pair_step
    parts = batch.split_by_budget(pairs, step.max_tokens, step.packing)
    return max(parts, key=lambda part: _work(trainer, part))


def _measure(
    trainer: RMiPOTrainer,
    largest: list[TokenizedPair],
    coming: list[list[TokenizedPair]],
    steps: float,
) -> tuple[float, int | None] | None:
    """(seconds a token, peak bytes above what is there, optimizer's moments included).

    None where the run is too short to be measured. The peak is measured where the largest
    micro-step has room in the share, and it is that of two in a row, where there is room for two:
    between them the allocator keeps what it can't give back.
    """
    mean_work = statistics.mean(_work(trainer, pairs) for pairs in coming)
    room = _SHARE * steps * mean_work
    shortest = min((pair for pairs in coming for pair in pairs), key=batch.packed_length)
    room -= _work(trainer, [shortest])
    ordinary = _within(trainer, coming[len(coming) // 2], room)
    fits = _work(trainer, largest) <= room
    if not fits and len(ordinary) < _LEAST_PAIRS:
        return None
    device = device_of(trainer.model)
    with phase(trainer, "timing a step"):
        # A tiny step first: what is loaded at first use is no step's.
        _run_once(trainer, [shortest])
        if not fits:
            return _timed(trainer, ordinary) / _work(trainer, ordinary), None
        memory, work, seconds = PeakMemory(device), 0, 0.0
        for part in (largest, _within(trainer, largest, room - _work(trainer, largest))):
            if len(part) >= _LEAST_PAIRS or not work:
                seconds += _timed(trainer, part)
                work += _work(trainer, part)
    growth = memory.growth()
    if growth is None:
        return seconds / work, None
    spread, kept = (_CPU_GROWTH, _kept_bytes(trainer)) if device.type == "cpu" else (1.0, 0)
    return seconds / work, int(growth * spread) + kept + _moment_bytes(trainer)


def _within(
    trainer: RMiPOTrainer, pairs: Sequence[TokenizedPair], room: float
) -> list[TokenizedPair]:
    """The first of the pairs that fit into so much work."""
    found: list[TokenizedPair] = []
    for pair in pairs:
        if _work(trainer, [*found, pair]) > room:
            break
        found.append(pair)
    return found


def _moment_bytes(trainer: RMiPOTrainer) -> int:
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    return trained * optimizer_width(str(getattr(trainer.args.optim, "value", trainer.args.optim)))


def _kept_bytes(trainer: RMiPOTrainer) -> int:
    """The start's weights, which a reference needs that goes on through a full training."""
    reference = trainer.pair_step.reference
    if trainer.start is not None or reference is None:
        return 0
    return sum(weight.nbytes for weight in (reference.start or {}).values())


def _moved_bytes(trainer: RMiPOTrainer, steps: int) -> int:
    """What a checkpoint has of a reference that moves; LoRA's grows by its rank every time."""
    args, reference = trainer.args, trainer.pair_step.reference
    if not args.ref_sync_steps or reference is None:
        return 0
    grows = trainer.start is not None and args.ref_sync_alpha < 1
    times = max(1, steps // args.ref_sync_steps) if grows else 1
    return times * sum(weight.nbytes for weight in (reference.start or {}).values())


def _disk(trainer: RMiPOTrainer, steps: int) -> int:
    """The run's folder at its fullest: checkpoints, one of them being replaced, and the adapter."""
    args = trainer.args
    saves = _times(args.save_strategy, args.save_steps, trainer, steps)
    kept = saves if not args.save_total_limit else min(saves, args.save_total_limit + 1)
    weights = _weight_bytes(trainer)
    moved = _moved_bytes(trainer, steps)
    state = 0 if args.save_only_model else _moment_bytes(trainer) + moved
    return kept * (weights + state) + weights


def _weight_bytes(trainer: RMiPOTrainer) -> int:
    """What every save writes: weights, tokenizer, options and the small files."""
    model = trainer.model
    is_adapter = isinstance(model, PeftModel)
    weights = [p for p in model.parameters() if p.requires_grad or not is_adapter]
    numbers = sum(p.numel() * p.element_size() for p in weights)
    names = sum(p.requires_grad for p in weights)
    return numbers + names * _BYTES_PER_NAME + _FIXED_FILE_BYTES + _tokenizer_bytes(trainer)


def _tokenizer_bytes(trainer: RMiPOTrainer) -> int:
    backend = getattr(trainer.processing_class, "backend_tokenizer", None)
    return 0 if backend is None else len(backend.to_str(pretty=True).encode())


def _nearest_folder(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(folder for folder in (path.resolve(), *path.resolve().parents) if folder.is_dir())
