"""DPO on one process and on two, over an epoch's end: how far apart the two runs are, and trl's.

The demo's model is trained in full, in float32. Rows and steps are the same; what differs is who
computes what. Of trl a step's pairs are divided by hand, since it counts them for each process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import ROOT
from benchmarks.peers import module
from benchmarks.records import Record
from rmipo_lite import RMiPOConfig, RMiPOTrainer
from rmipo_lite.demo import MODEL, load_rows
from rmipo_lite.output.console import rank, say

ROWS, PAIRS_OF_A_STEP, STEPS = 42, 8, 12  # the sixth step of an epoch has two pairs
_SHARED: dict[str, Any] = {
    "max_steps": STEPS, "learning_rate": 1e-4, "lr_scheduler_type": "constant", "warmup_steps": 0,
    "logging_steps": 1, "report_to": "none", "save_strategy": "no", "use_cpu": True, "bf16": False,
    "disable_tqdm": True, "train_sampling_strategy": "sequential", "gradient_checkpointing": False,
    "max_length": 256,
}  # fmt: skip


def bench() -> Iterator[Record]:
    """The largest difference of a step's loss and of a weight, ours and trl's."""
    shape = f"demo's model, {STEPS} steps of {PAIRS_OF_A_STEP} of {ROWS} pairs, 1 and 2 processes"
    for who in ("ours", "trl"):
        with tempfile.TemporaryDirectory() as folder:
            one, two = (_started(who, processes, Path(folder)) for processes in (1, 2))
        apart = [abs(a - b) for a, b in zip(one["losses"], two["losses"], strict=True)]
        weights = max(
            float((one["weights"][name] - weight).abs().max())
            for name, weight in two["weights"].items()
        )
        say(f"{who}: losses apart by {', '.join(f'{number:.1e}' for number in apart)}")
        for what, number in (("loss", max(apart)), ("weights", weights)):
            yield Record("processes", who, shape, "float32", f"{what}, apart", "", number)


def _started(who: str, processes: int, folder: Path) -> dict[str, Any]:
    """What a run on so many processes came to."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    out = folder / f"{processes}.pt"
    command = [sys.executable, *launcher, "-m", "benchmarks.processes", who, str(out)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, env=env, cwd=ROOT, check=True, capture_output=True)
    found: dict[str, Any] = torch.load(out)
    return found


def _run(who: str, out: Path) -> None:
    """In each of the processes."""
    processes = int(os.environ["WORLD_SIZE"])
    rows, tokenizer = load_rows()[:ROWS], AutoTokenizer.from_pretrained(MODEL)
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    if who == "ours":
        args: Any = RMiPOConfig(
            str(out.with_suffix("")), loss_type="dpo", eval_completions=0,
            per_device_train_batch_size=PAIRS_OF_A_STEP, **_SHARED,
        )  # fmt: skip
        trainer: Any = RMiPOTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    else:
        trl = module("trl")
        args = trl.DPOConfig(
            str(out.with_suffix("")), remove_unused_columns=False,
            per_device_train_batch_size=PAIRS_OF_A_STEP // processes, **_SHARED,
        )  # fmt: skip
        trainer = trl.DPOTrainer(
            model=str(MODEL), args=args, processing_class=tokenizer,
            train_dataset=module("datasets").Dataset.from_list(rows),
        )  # fmt: skip
    trainer.train()
    if rank():
        return
    weights = trainer.accelerator.unwrap_model(trainer.model).state_dict()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    torch.save({"losses": losses, "weights": weights}, out)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    _run(sys.argv[1], Path(sys.argv[2]))
