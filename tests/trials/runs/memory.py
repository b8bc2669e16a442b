"""Checks 27, 28: train() called again and again; the caller's surroundings and memory after it."""

from __future__ import annotations

import gc
import logging
import os
import random
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
import torch
from torch import nn
from transformers import PreTrainedModel

from rmipo_lite.adapters.attach import detach_adapter
from rmipo_lite.adapters.base_model import causal_lm
from rmipo_lite.model.head import read_head
from rmipo_lite.ops import linear_logps, rmipo_loss
from rmipo_lite.step import pair_step as step_module
from tests.kit import tiny_model, train_words, word_tokenizer
from tests.trials.scorecard import Check, Trial, Trials, expect

_TOKENIZER_FIELDS = (
    "padding_side", "truncation_side", "chat_template", "special_tokens_map", "model_max_length",
    "init_kwargs",
)  # fmt: skip


# ---- 27: the caller's surroundings ----------------------------------------------------------


class _Planted(RuntimeError):
    """The fault that a trial puts into a run."""


def _fails_at(place: str, error: type[BaseException]) -> Any:
    """Let train() fail in the middle: while it packs, steps, evaluates or saves."""
    owner, name = {
        "self-check": ("rmipo_lite.step.make.packing_problem", ""),
        "a step": ("rmipo_lite.step.pair_step.read_head", ""),
        "the update": ("torch.optim.AdamW.step", ""),
        "the result": ("rmipo_lite.run.TrainResult", ""),
    }[place]
    return mock.patch(owner + name, side_effect=error("planted"))


_ENDINGS: tuple[tuple[str, type[BaseException]] | None, ...] = (
    None,
    ("self-check", _Planted),
    ("a step", _Planted),
    ("the update", KeyboardInterrupt),
    ("the result", _Planted),
)


def surroundings(trials: Trials) -> None:
    """train() returns or raises: model, tokenizer, random numbers and process are as before."""
    for trial in trials:
        with trial:
            ending = _ENDINGS[trial.index % len(_ENDINGS)]
            options = {
                "max_steps": 2,
                "gradient_checkpointing": trial.rng.choice((None, True)),
                "bf16": trial.rng.random() < 0.5,
                "eval_strategy": trial.rng.choice(("no", "epoch")),
            }
            how = "returns" if ending is None else f"{ending[1].__name__} in {ending[0]}"
            trial.tried = f"{how}, {options}"
            model, tokenizer = tiny_model(attention_dropout=0.1), word_tokenizer()
            model.train(trial.rng.random() < 0.5)
            before = _process(), _model(model), _tokenizer(tokenizer)
            if ending is None:
                _returns(trial, model, tokenizer, options)
            else:
                _raises(trial, model, tokenizer, options, ending)
            _same("process", before[0], _process())
            _same("tokenizer", before[2], _tokenizer(tokenizer))
            _same("model", before[1], _model(model))


def _returns(trial: Trial, model: Any, tokenizer: Any, options: dict[str, Any]) -> None:
    """Three calls on one model: the adapter goes on, goes on again, and is made anew."""
    first = train_words(model, trial.folder / "1", None, tokenizer, **options)
    names = {name for name, p in first.model.named_parameters() if p.requires_grad}
    second = train_words(model, trial.folder / "2", None, tokenizer, **options)
    expect(second.model is first.model, "the second call made another PeftModel")
    fresh = train_words(model, trial.folder / "3", None, tokenizer, peft_config="new", **options)
    for result in (second, fresh):
        own = {name for name, p in result.model.named_parameters() if p.requires_grad}
        expect(own == names, f"trained weights differ: {len(own)} and {len(names)}")
    expect("forward" not in vars(fresh.model), "a wrapped forward is left")
    before, after = (
        fresh.metrics_before["eval_loss"],
        first.metrics_before["eval_loss"],
    )
    expect(abs(before - after) < 1e-6, "the new adapter does not begin as the first one began")
    # What stays by contract is the adapter; without it the model is the caller's again.
    detach_adapter(model)
    for parameter in model.parameters():
        expect(not parameter.requires_grad, "a base weight is trained beside the adapter")
        parameter.requires_grad_(True)


def _raises(trial: Trial, model: Any, tokenizer: Any, options: dict[str, Any], ending: Any) -> None:
    with _fails_at(*ending):
        try:
            train_words(model, trial.folder / "1", None, tokenizer, **options)
        except ending[1]:
            return
    expect(False, "train() did not raise")


def _model(model: PreTrainedModel) -> dict[str, Any]:
    base = causal_lm(model)
    state: dict[str, Any] = {
        "config": base.config.to_dict(),
        "attention": base.config._attn_implementation,
        "generation": base.generation_config.to_dict(),
    }
    for name, parameter in base.named_parameters():
        state[f"{name}: bits"] = parameter.detach().clone()
        state[f"{name}: flags"] = (parameter.requires_grad, parameter.dtype, parameter.grad is None)
    for name, module in base.named_modules():
        state[f"{name}: module"] = (
            type(module).__name__,
            module.training,
            [len(getattr(module, hooks)) for hooks in _HOOKS],
        )
        for key, value in vars(module).items():
            state[f"{name}: {key}"] = value if isinstance(value, (bool, float)) else "there"
    return state


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _tokenizer(tokenizer: Any) -> dict[str, Any]:
    fields = {name: getattr(tokenizer, name) for name in _TOKENIZER_FIELDS}
    return {**fields, "length": len(tokenizer), "ids": tokenizer("w5 w6")["input_ids"]}


def _process() -> dict[str, Any]:
    return {
        "python random": random.getstate(),
        "numpy random": np.random.get_state()[1].tolist(),  # type: ignore[index] # noqa: NPY002
        "torch random": torch.get_rng_state(),
        "environment": dict(os.environ),
        "warning filters": list(warnings.filters),
        "SIGINT": signal.getsignal(signal.SIGINT),
        "SIGTERM": signal.getsignal(signal.SIGTERM),
        "streams": (sys.stdout, sys.stderr, sys.excepthook),
        "folder": Path.cwd(),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "log level": logging.getLogger("transformers").level,
    }


def _same(what: str, before: dict[str, Any], after: dict[str, Any]) -> None:
    for name in before.keys() | after.keys():
        a, b = before.get(name), after.get(name)
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            expect(torch.equal(a, b), f"{what}: {name} has changed")
        else:
            expect(a == b, f"{what}: {name} was {str(a)[:200]}, is {str(b)[:200]}")


# ---- 28: memory -----------------------------------------------------------------------------


def flat_memory(trials: Trials) -> None:
    """2,000 calls of the kernels, 10 of train(), 10 that raise: nothing stays behind."""
    for trial in trials:
        with trial:
            run = trial.folder / "run"
            name, action, count, most = (
                ("calls of the kernels", _kernels(), 2000, 1.0),
                ("train()", partial(_one_run, run, fails=False), 10, 20.0),
                ("train() that raises", partial(_one_run, run, fails=True), 10, 20.0),
            )[trial.index]
            trial.tried = f"{count} times {name}"
            # The first calls fill caches that stay: allocator, autograd, transformers' own.
            for _ in range(max(3, count // 10)):
                action()
            tensors, size = _live_tensors(), _resident()
            for _ in range(count):
                action()
            grown = (_resident() - size) / 2**20
            expect(_live_tensors() <= tensors, f"{_live_tensors() - tensors} more live tensors")
            expect(grown < most, f"grown by {grown:.1f} MiB")


def _kernels() -> Callable[[], None]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 32, generator=generator, requires_grad=True)
    weight = torch.randn(97, 32, generator=generator)
    targets = torch.randint(0, 97, (40,), generator=generator)

    def call() -> None:
        logps = linear_logps(hidden, weight, targets).view(4, 10).mean(1)
        prior = logps.detach() - 0.1
        rmipo_loss(logps[:2], logps[2:], prior[:2], prior[2:]).loss.sum().backward()
        hidden.grad = None

    return call


def _one_run(folder: Path, fails: bool) -> None:
    """A run whose model and result go out of reach, as a notebook cell's do when it runs again."""
    real = read_head
    calls = 0

    def failing(model: nn.Module) -> Any:
        nonlocal calls
        calls += model.training
        if fails and calls > 1:  # within a step
            raise _Planted("planted")
        return real(model)

    with mock.patch.object(step_module, "read_head", failing):
        try:
            train_words(tiny_model(), folder, max_steps=3)
        except _Planted as error:
            # What a notebook does, and what keeps everything alive that the frames hold.
            sys.last_value, sys.last_traceback = error, error.__traceback__
    shutil.rmtree(folder)


def _live_tensors() -> int:
    gc.collect()
    return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())


def _resident() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


CHECKS = [
    Check(27, "train() again and again: surroundings as before", 10, surroundings, least=5),
    Check(28, "memory flat: kernels, train(), exceptions", 3, flat_memory, least=3, is_long=True),
]
