"""What every process of a group does in a test: scenarios one after the other, a file of each.

`python -m torch.distributed.run --nproc_per_node N -m tests.parallel.worker FOLDER NAME...`, or
FOLDER FILE.json with lists of options, and in the test's own process for one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import itertools
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import PartialState
from peft import LoraConfig
from torch import nn
from transformers import TrainerCallback

from rmipo_lite import train
from rmipo_lite.checkpoints import trainer_mixin
from rmipo_lite.checkpoints.weights import save_run
from rmipo_lite.config import RMiPOConfig
from rmipo_lite.methods.table import method_named
from rmipo_lite.model.backbone import scored_hidden
from rmipo_lite.parallel.group import Group
from rmipo_lite.parallel.sharded import full, is_part
from rmipo_lite.step import pair_step
from rmipo_lite.tokens.pair import TokenizedPair
from rmipo_lite.training.trainer import RMiPOTrainer
from tests.kit import random_pairs, tiny_model, word_rows, word_tokenizer

POISON = [5] * 6  # tokens that no other pair has in a row
_real = scored_hidden


def _trainer(folder: Path, **options: Any) -> RMiPOTrainer:
    """7 pairs a step, micro-steps of a pair or two, over an epoch's end, evaluated every 5."""
    pairs = options.pop("pairs", None) or random_pairs(options.pop("count", 40))
    model = options.pop("model", None) or tiny_model("llama")
    peft_config, callbacks = options.pop("peft_config", "auto"), options.pop("callbacks", None)
    settings = {
        "max_steps": 18, "per_device_train_batch_size": 7, "learning_rate": 1e-3, "use_cpu": True,
        "eval_strategy": "steps", "eval_steps": 5, "save_strategy": "steps", "save_steps": 9,
        "logging_steps": 1, "disable_tqdm": True, "eval_completions": 0, "sft_weight": 1.0,
        "max_tokens_per_microstep": 60, "save_pair_values": True,
    }  # fmt: skip
    args = RMiPOConfig(str(folder / "run"), **{**settings, **options})
    return RMiPOTrainer(
        model, args, train_dataset=pairs, processing_class=word_tokenizer(), callbacks=callbacks,
        eval_dataset=_labelled(random_pairs(9, seed=5), args.loss_type), peft_config=peft_config,
    )  # fmt: skip


def _labelled(pairs: list[TokenizedPair], loss_type: str) -> list[TokenizedPair]:
    """Of a method of unpaired rows every second label is true."""
    if not method_named(loss_type).unpaired:
        return pairs
    return [dataclasses.replace(pair, label=number % 2 == 0) for number, pair in enumerate(pairs)]


def _outcome(trainer: RMiPOTrainer, resume: Any = None) -> dict[str, Any]:
    trainer.train(resume_from_checkpoint=resume)
    return {
        "log": list(trainer.state.log_history),
        "weights": {
            name: full(weight.detach()).clone()
            for name, weight in trainer.model.named_parameters()
            if weight.requires_grad
        },
        "dropped": trainer.dropped_pairs,
        "failed": trainer.failed_saves,
        "budget": trainer.pair_step.max_tokens,
        "parts": sum(map(is_part, trainer.model.parameters())),
    }


def _short(folder: Path, **options: Any) -> dict[str, Any]:
    given = {"max_steps": 6, "eval_steps": 3, "save_strategy": "no", "sft_weight": 0.0}
    return _outcome(_trainer(folder, **{**given, **options}))


@contextlib.contextmanager
def _hidden(change: Callable[[Any, torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """What the last hidden states are made into, or an error instead."""

    def changed(model: nn.Module, inputs: Any) -> torch.Tensor:
        return change(inputs, _real(model, inputs))

    with mock.patch.object(pair_step, "scored_hidden", changed):
        yield


@contextlib.contextmanager
def _out_of_memory(times: int, *, for_ever: bool = False) -> Iterator[None]:
    """The last process runs out so often."""
    group, left = Group.current(), [times]

    def fail(inputs: Any, hidden: torch.Tensor) -> torch.Tensor:
        is_mine = group.size > 1 and group.rank == group.size - 1
        # Alone and without a gradient there would be no way out of it.
        can_do_with_less = torch.is_grad_enabled() or len(inputs.cu_seqlens) > 3
        if is_mine and left[0] and (can_do_with_less or for_ever):
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return hidden

    with _hidden(fail):
        yield


def out_of_memory(folder: Path) -> dict[str, Any]:
    with _out_of_memory(2), contextlib.redirect_stderr(io.StringIO()) as said:
        return {**_short(folder, max_tokens_per_microstep=200), "said": said.getvalue()}


def out_of_memory_for_ever(folder: Path) -> dict[str, Any]:
    with _out_of_memory(10**9, for_ever=True), contextlib.redirect_stderr(io.StringIO()):
        try:
            _short(folder)
        except RuntimeError as error:
            return {"error": f"{type(error).__name__}: {error}"}
    return {"error": "none"}


@contextlib.contextmanager
def _poisoned(
    rows: set[int],
    pairs: list[TokenizedPair],
    also: Callable[[Any, torch.Tensor], torch.Tensor] = lambda inputs, hidden: hidden,
) -> Iterator[list[TokenizedPair]]:
    """The pairs, of which those of these rows have no number; `also` is done to every pass."""

    def poison(inputs: Any, hidden: torch.Tensor) -> torch.Tensor:
        targets, borders = inputs.target_ids.tolist(), inputs.cu_seqlens.tolist()
        factors = torch.ones(len(hidden), 1, dtype=hidden.dtype)
        for start, end in itertools.pairwise(borders):  # of each sequence its own rows
            if targets[start:end][: len(POISON)] == POISON:
                factors[start:end] = torch.nan
        return also(inputs, hidden) * factors

    with _hidden(poison):
        yield [
            dataclasses.replace(pair, chosen_ids=[*POISON, *pair.chosen_ids])
            if pair.row in rows
            else pair
            for pair in pairs
        ]


def not_finite(folder: Path, **options: Any) -> dict[str, Any]:
    with _poisoned({3, 17}, random_pairs(40)) as pairs:
        return _short(folder, pairs=pairs, **options)


@contextlib.contextmanager
def _full_disk() -> Iterator[None]:
    """The first save fails."""
    real, left = save_run, [1]

    def save(*args: Any, **kwargs: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    with mock.patch.object(trainer_mixin, "save_run", save):
        yield


def full_disk(folder: Path) -> dict[str, Any]:
    """The second save doesn't fail."""
    trainer = _trainer(folder, max_steps=6, save_steps=3)
    with _full_disk():
        return _outcome(trainer)


def drawn(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Any options, with a fault: memory, number or disk."""
    options = dict(options)
    fault, count = options.pop("fault"), options.pop("count")
    pairs = _labelled(random_pairs(count), options["loss_type"])
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        if fault == "memory":
            stack.enter_context(_out_of_memory(1))
        if fault == "number":
            pairs = stack.enter_context(_poisoned({1}, pairs))
        trainer = _trainer(folder, pairs=pairs, **options)
        if fault == "disk":
            stack.enter_context(_full_disk())
        return _outcome(trainer)


def soaked(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Many steps; memory that runs out at any pass of any process, and disks at any save."""
    draw, real = random.Random(f"{options['seed']}/{Group.current().rank}"), save_run

    def fail_now_and_then(inputs: Any, hidden: torch.Tensor) -> torch.Tensor:
        can_do_with_less = torch.is_grad_enabled() and len(inputs.cu_seqlens) > 3
        if Group.current().size > 1 and can_do_with_less and draw.random() < 0.02:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return hidden

    def save_now_and_then(*args: Any, **kwargs: Any) -> Any:
        if Group.current().size > 1 and draw.random() < 0.3:
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    with (
        _poisoned({3, 17}, random_pairs(40), also=fail_now_and_then) as pairs,
        contextlib.redirect_stderr(io.StringIO()) as said,
    ):
        trainer = _trainer(
            folder, pairs=pairs, max_steps=options["steps"], save_steps=20, eval_steps=25,
            learning_rate=2e-4, max_tokens_per_microstep=100,
        )  # fmt: skip
        with mock.patch.object(trainer_mixin, "save_run", save_now_and_then):
            found = _outcome(trainer)
    return {**found, "shortages": said.getvalue().count("Out of memory")}


class _StopsInTheLast(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        group = Group.current()
        if state.global_step == 4 and group.rank == group.size - 1:
            control.should_training_stop = True


def stopped_by_one(folder: Path) -> dict[str, Any]:
    return _short(folder, callbacks=[_StopsInTheLast()])


def unused_weight(folder: Path) -> dict[str, Any]:
    """A trained weight that no pass reaches has no gradient, and isn't decayed."""
    model = tiny_model("llama")
    model.register_parameter("unused", nn.Parameter(torch.ones(3)))
    return _short(folder, model=model, peft_config=None, weight_decay=0.5)


def resumed(folder: Path) -> dict[str, Any]:
    """From step 9 of `plain`."""
    checkpoint = folder.parent / "plain" / "run" / "checkpoint-9"
    return _outcome(_trainer(folder), resume=str(checkpoint))


def one_line(folder: Path, **options: Any) -> dict[str, Any]:
    """`train()` on a folder with a model in 4 bits, whose prompts are answered."""
    saved = folder / "model"
    if Group.current().is_first:
        model = tiny_model("llama", hidden_size=64, intermediate_size=128)
        model.save_pretrained(saved)
        word_tokenizer().save_pretrained(saved)
    Group.current().gather(None)
    result = train(
        str(saved), word_rows(60), output_dir=folder / "run", quantization="4bit", max_steps=3,
        per_device_train_batch_size=7, learning_rate=2e-3, use_cpu=True, logging_steps=1,
        disable_tqdm=True, eval_completions=2, sample_prompts=1, **options,
    )  # fmt: skip
    result.save(folder / "again")
    weights = {n: p for n, p in result.model.named_parameters() if p.requires_grad}
    return {
        "log": result.history,
        "weights": {name: full(weight.detach()).clone() for name, weight in weights.items()},
        "dropped": [],
        "failed": [] if result.unsaved is None else [result.unsaved],
        "parts": sum(map(is_part, result.model.parameters())),
    }


def _ends(**options: Any) -> dict[str, Any]:
    """LoRA on head and layers, the embeddings trained as they are; nothing tied."""
    targets = ["q_proj", "down_proj", "lm_head"]
    config = LoraConfig(r=4, target_modules=targets, modules_to_save=["embed_tokens"])
    model = tiny_model("llama", tie_word_embeddings=False)
    return {"model": model, "peft_config": config, **options}


_PARTS = {"fsdp": True}

SHARDED: dict[str, Callable[[Path], dict[str, Any]]] = {
    "sharded": lambda folder: _outcome(_trainer(folder, **_PARTS)),
    "sharded_fewer": lambda folder: _short(folder, count=8, **_PARTS),
    "sharded_full": lambda folder: _short(
        folder, peft_config=None, loss_type="dpo", reference="live", learning_rate=1e-3, **_PARTS
    ),
    "sharded_signs": lambda folder: _short(folder, loss_type="epsilon_dpo", **_PARTS),
    "sharded_rate": lambda folder: _short(folder, learning_rate="auto", optim="sgd", **_PARTS),
    "sharded_ends": lambda folder: _short(folder, **_ends(), **_PARTS),
    "sharded_padded": lambda folder: _short(
        folder, packing=False, gradient_checkpointing=True, eval_completions=2, **_PARTS
    ),
    "sharded_cached": lambda folder: _short(folder, prior="cached", loss_type="kto_pair", **_PARTS),
    "sharded_not_finite": lambda folder: not_finite(folder, **_PARTS),
    "sharded_4bit": lambda folder: one_line(folder, **_PARTS),
    "sharded_resumed": lambda folder: _outcome(
        _trainer(folder, **_PARTS),
        resume=str(folder.parent / "sharded" / "run" / "checkpoint-9"),
    ),
}

SCENARIOS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "plain": lambda folder: _outcome(_trainer(folder)),
    "fewer_pairs_than_processes": lambda folder: _short(folder, count=8),
    "full_training": lambda folder: _short(
        folder, peft_config=None, loss_type="dpo", reference="live", learning_rate=1e-3
    ),
    "kto_pair": lambda folder: _short(folder, loss_type="kto_pair"),
    "epsilon_dpo": lambda folder: _short(folder, loss_type="epsilon_dpo"),
    "found_rate": lambda folder: _short(folder, learning_rate="auto", optim="sgd"),
    "out_of_memory": out_of_memory,
    "out_of_memory_for_ever": out_of_memory_for_ever,
    "not_finite": not_finite,
    "full_disk": full_disk,
    "stopped_by_one": stopped_by_one,
    "unused_weight": unused_weight,
    "resumed": resumed,
}


def run(folder: Path, names: list[str]) -> None:
    """Each into a folder of its own, with what came of it by rank."""
    for name in names:
        keep(folder / name, {**SCENARIOS, **SHARDED}[name])


def run_drawn(folder: Path, file: Path) -> None:
    """The same of lists of options, by number."""
    for number, options in enumerate(json.loads(file.read_text(encoding="utf-8"))):
        scenario = soaked if "steps" in options else drawn
        keep(folder / str(number), functools.partial(scenario, options=options))


def keep(into: Path, scenario: Callable[[Path], dict[str, Any]]) -> None:
    """What came of a scenario, or the error that it ended with."""
    into.mkdir(parents=True, exist_ok=True)
    with contextlib.redirect_stdout(io.StringIO()):
        found = scenario(into)
    torch.save(found, into / f"rank{Group.current().rank}.pt")


if __name__ == "__main__":
    PartialState(cpu=True)
    target, names = Path(sys.argv[1]), sys.argv[2:]
    if names[0].endswith(".json"):
        run_drawn(target, Path(names[0]))
    else:
        run(target, names)
