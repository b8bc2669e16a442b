"""Check 39: what a run says beforehand that it will take, against what it then takes.

Nothing here depends on what else the machine does: the clock counts work. Memory is the process's
own, disk is counted in bytes. How far the heap grows differs by some 6 % between runs of the same
seed, so a run that is off is run twice more, and the middle one of the three counts.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import LlamaConfig, LlamaForCausalLM

from rmipo_lite import run
from rmipo_lite.checkpoints.sealed_folder import checkpoints
from rmipo_lite.planning.device import PeakMemory
from rmipo_lite.training import rehearsal
from rmipo_lite.training.rehearsal import Plan
from rmipo_lite.training.trainer import RMiPOTrainer
from tests.kit import VOCAB, train_words
from tests.trials.runs.children import start
from tests.trials.scorecard import Check, Trial, Trials, expect

_WITHIN = 0.15
_CPU = torch.device("cpu")
_ANSWER = "planned and taken: "


class _Work(TorchDispatchMode):
    """A clock that goes on by what is computed: products' terms, and numbers read and written."""

    def __init__(self) -> None:
        super().__init__()
        self.done = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        flops = flop_registry.get(func._overloadpacket)
        if flops is not None:
            self.done += flops(*args, **(kwargs or {}), out_val=result)
        else:
            tensors = [x for x in tree_leaves((args, result)) if isinstance(x, torch.Tensor)]
            self.done += sum(tensor.numel() for tensor in tensors)
        return result

    def perf_counter(self) -> float:
        """Seconds of a machine that does 10^9 a second."""
        return self.done / 1e9


def plans(trials: Trials) -> None:
    """Time, memory and disk as planned, against what the run then took."""
    for trial in trials:
        with trial:
            shape = {
                "hidden_size": trial.rng.choice((128, 256)),
                "intermediate_size": trial.rng.choice((256, 640)),
                "num_hidden_layers": trial.rng.choice((2, 4)),
            }
            options = {
                "max_steps": 24,
                "save_steps": trial.rng.choice((8, 12)),
                "per_device_train_batch_size": trial.rng.choice((8, 16)),
            }
            trial.tried = f"{shape}, {options}"
            errors = _errors(trial, shape, options)
            if not _within(errors):
                runs = [errors, *(_errors(trial, shape, options) for _ in range(2))]
                errors = {name: statistics.median(run[name] for run in runs) for name in errors}
            told = ", ".join(f"{name} {error:+.0%}" for name, error in errors.items())
            trial.tried += f": {told}"
            expect(_within(errors), f"off by {told}")


def _within(errors: dict[str, float]) -> bool:
    return all(abs(error) <= _WITHIN for error in errors.values())


def _errors(trial: Trial, shape: dict[str, Any], options: dict[str, Any]) -> dict[str, float]:
    """How far the plan is off what the run then took, in a child: memory here has a history."""
    folder = Path(tempfile.mkdtemp(dir=trial.folder))
    args = (str(folder / "run"), trial.index, shape, options)
    child = start(planned_run, *args, output=folder / "out")
    expect(child.wait(seconds=600) == 0, f"the run failed: {child.text()[-400:]}")
    plan, taken = json.loads(child.text().rsplit(_ANSWER, 1)[1])
    return {name: plan[name] / taken[name] - 1 for name in taken}


def planned_run(folder: str, index: int, shape: dict[str, Any], options: dict[str, Any]) -> None:
    """Train, watching; print what was planned and what was taken."""
    torch.manual_seed(index)
    config = LlamaConfig(
        vocab_size=VOCAB, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=512, bos_token_id=1, eos_token_id=2, **shape,
    )  # fmt: skip
    work = _Work()
    watch = _Watch(work)
    with (
        work,
        mock.patch.object(rehearsal, "time", work),
        mock.patch.object(run, "plan_run", watch.plan),
        mock.patch.object(RMiPOTrainer, "train", watch.train()),
    ):
        rows = _rows_of_one_length(index)
        result = train_words(LlamaForCausalLM(config), Path(folder), rows, **options)
    # At its fullest the folder held one checkpoint more, the one that the last save replaced.
    replaced = options["max_steps"] > 2 * options["save_steps"]
    places = [Path(folder), *([checkpoints(folder)[-1]] if replaced else [])]
    files = [path for place in places for path in place.rglob("*") if path.is_file()]
    watch.taken["disk"] = sum(path.stat().st_size for path in files)
    plan = {name: getattr(result.plan, name) for name in watch.taken}
    sys.stdout.write(_ANSWER + json.dumps([plan, watch.taken]))
    sys.stdout.flush()


def _rows_of_one_length(seed: int) -> list[dict[str, str]]:
    """Memory is planned for the longest pairs, so every step is to hold such."""

    rng = random.Random(seed)

    def words(count: int) -> str:
        return " ".join(f"w{rng.randrange(3, VOCAB - 1)}" for _ in range(count))

    return [{"prompt": words(60), "chosen": words(50), "rejected": words(50)} for _ in range(200)]


class _Watch:
    """Measures a run from its plan to the end of its loop."""

    def __init__(self, clock: _Work) -> None:
        self.taken: dict[str, float] = {}
        self._clock = clock
        self._base = 0

    def plan(self, *args: Any, **kwargs: Any) -> Plan:
        """Plan the run; its memory counts from before the plan's own measurement."""
        self._base = PeakMemory(_CPU).before
        return rehearsal.plan_run(*args, **kwargs)

    def train(self) -> Any:
        """A `train` that is timed."""
        real = RMiPOTrainer.train

        def timed(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            memory = PeakMemory(_CPU)
            start = self._clock.perf_counter()
            output = real(trainer, *args, **kwargs)
            self.taken["seconds"] = self._clock.perf_counter() - start
            self.taken["memory"] = memory.before + (memory.growth() or 0) - self._base
            return output

        return timed


CHECKS = [
    Check(39, "work, memory and disk as planned, within 15 %", 10, plans, least=2, is_long=True)
]
