"""`estimate` against what runs really took: peak memory and time of five shapes on this CPU.

Each run is the trainer's own, in a process of its own: random weights of the shape are loaded from
a folder and trained for some steps. Its peak is that of the resident set above its size just before
the model was loaded. It is measured twice: with an allocator that hands back at once what is freed
and without oneDNN's store of compiled products (memory in use, which is what is estimated), and
with both as they are, which keep more.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks.child import ask
from benchmarks.records import Record
from rmipo_lite.config import RMiPOConfig
from rmipo_lite.demo.data import MODEL
from rmipo_lite.output.console import watched_bars
from rmipo_lite.planning.device import PeakMemory
from rmipo_lite.planning.estimation import estimate
from rmipo_lite.tokens.pair import TokenizedPair
from rmipo_lite.training.trainer import RMiPOTrainer

STEPS = 4
# glibc gives blocks above this size (bytes) pages of their own, and takes them back when freed.
# oneDNN keeps a compiled product for every length it has met: 350 MiB after six bfloat16 steps.
_HANDED_BACK = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0",
    "LRU_CACHE_CAPACITY": "1",
}
_LIMIT_S = 900
PEAK, STEP_TIME = "peak memory", "seconds of a step"
_CPU = torch.device("cpu")


class Case(NamedTuple):
    """A shape: an architecture and its sizes, pairs of about these lengths, options of the run."""

    name: str
    kind: str
    sizes: dict[str, Any]
    lengths: tuple[int, int, int]  # prompt, chosen, rejected
    options: dict[str, Any]


def _llama(hidden: int, inner: int, layers: int, heads: int, kv: int, vocab: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": vocab,
    }  # fmt: skip


CASES = (
    Case("llama H=512 L=8 V=32k", "llama", _llama(512, 1408, 8, 8, 4, 32000), (60, 90, 80),
         {"per_device_train_batch_size": 8}),
    Case("llama H=768 L=12 V=128k", "llama", _llama(768, 2048, 12, 12, 12, 128256), (100, 150, 120),
         {"per_device_train_batch_size": 4}),
    Case("gpt2 H=768 L=12 V=50k", "gpt2",
         {"n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257}, (40, 60, 60),
         {"per_device_train_batch_size": 8}),
    Case("qwen2 H=896 L=12 V=152k ckpt", "qwen2",
         _llama(896, 4864, 12, 14, 2, 151936) | {"tie_word_embeddings": True}, (200, 300, 274),
         {"per_device_train_batch_size": 2, "gradient_checkpointing": True}),
    Case("llama H=1024 L=8 V=32k bf16", "llama", _llama(1024, 2816, 8, 16, 8, 32000),
         (120, 200, 180), {"per_device_train_batch_size": 4, "bf16": True}),
)  # fmt: skip


def bench(cases: tuple[Case, ...] = CASES, steps: int = STEPS) -> Iterator[Record]:
    """Estimated and measured peak and seconds of every case, and their ratios."""
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            _save_model(case, Path(folder))
            counted = _estimate(case, Path(folder), steps)
            in_use = _in_child(case, Path(folder), steps, _HANDED_BACK)
            plain = _in_child(case, Path(folder), steps, {})
        yield from _rows(case, PEAK, "MiB", counted[PEAK] / 2**20, in_use[PEAK] / 2**20)
        held = plain[PEAK] / 2**20
        yield _row(case, "measured", f"{PEAK}, as it is held", "MiB", held)
        yield from _rows(case, STEP_TIME, "s", counted[STEP_TIME], plain[STEP_TIME])


def _rows(case: Case, metric: str, unit: str, counted: float, measured: float) -> Iterator[Record]:
    yield _row(case, "estimate", metric, unit, counted)
    yield _row(case, "measured", metric, unit, measured)
    yield _row(case, "estimate", f"{metric} over measured", "ratio", counted / measured)


def _row(case: Case, impl: str, metric: str, unit: str, value: float) -> Record:
    dtype = "bf16" if case.options.get("bf16") else "fp32"
    return Record("estimate", impl, case.name, dtype, metric, unit, value, value, value)


def _save_model(case: Case, folder: Path) -> None:
    config = AutoConfig.for_model(case.kind, **case.sizes)
    dtype = torch.bfloat16 if case.options.get("bf16") else torch.float32
    with watched_bars():
        AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)


def _pairs(case: Case, steps: int) -> list[TokenizedPair]:
    """Pairs whose lengths differ by up to a tenth."""
    draw = random.Random(0)
    vocab = int(case.sizes["vocab_size"])

    def ids(length: int) -> list[int]:
        return [draw.randrange(3, vocab) for _ in range(round(length * draw.uniform(0.9, 1.0)))]

    count = steps * int(case.options["per_device_train_batch_size"])
    return [TokenizedPair(i, *(ids(length) for length in case.lengths)) for i in range(count)]


def _estimate(case: Case, folder: Path, steps: int) -> dict[str, float]:
    found = estimate(str(folder), _pairs(case, steps), gpu="cpu", **case.options)
    assert found.fit.seconds is not None
    return {
        PEAK: float(found.fit.peak),
        STEP_TIME: found.fit.seconds / found.steps,
    }


def _in_child(
    case: Case, folder: Path, steps: int, environment: dict[str, str]
) -> dict[str, float]:
    question, what = [case, str(folder), steps], f"estimate, {case.name}"
    found: dict[str, float] = ask(__name__, question, what, _LIMIT_S, environment)
    return found


# ---- in the child ------------------------------------------------------------------------------


def _measure(case: Case, folder: Path, steps: int) -> dict[str, float]:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    pairs = _pairs(case, steps)
    # What is loaded at first use is no run's.
    warm = [TokenizedPair(row, [5, 6], [7, 8], [9]) for row in range(2)]
    _train(str(MODEL), tokenizer, warm, folder / "a", {}, 1)
    memory = PeakMemory(_CPU)
    seconds = _train(str(folder), tokenizer, pairs, folder / "b", case.options, steps)
    growth = memory.growth()
    if growth is None:
        raise RuntimeError("this system doesn't tell a process's peak memory")
    return {PEAK: float(growth), STEP_TIME: seconds / steps}


def _train(
    model: str, tokenizer: Any, pairs: list[TokenizedPair], out: Path, options: dict[str, Any],
    steps: int,
) -> float:  # fmt: skip
    """Seconds of the training loop."""
    args = RMiPOConfig(
        str(out), use_cpu=True, save_strategy="no", max_steps=steps, disable_tqdm=True,
        learning_rate=1e-5, **options,  # a search would be steps of another size
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = RMiPOTrainer(
            model, args, train_dataset=pairs, processing_class=tokenizer, peft_config="auto"
        )
        return float(trainer.train().metrics["train_runtime"])


def main(words: str) -> None:
    """Measure one case and print it as JSON."""
    case, folder, steps = json.loads(words)
    print(json.dumps(_measure(Case(*case), Path(folder), steps)))  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1])
