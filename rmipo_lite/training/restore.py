"""The caller's surroundings: what a run changes there is put back, whether it returns or raises.

On the model: mode, dropout, use_cache, attention, checkpointing, hooks, wrapped forwards. Around
it: random numbers, environment variables, warning filters, torch's deterministic algorithms,
transformers' verbosity. The adapter stays on a model whose training returned; where it raised, an
adapter that this run attached comes off, one that it took off is back, and what it froze is free
again.
"""

import gc
import os
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from rmipo_lite.adapters.attach import ADAPTED, detach_adapter
from rmipo_lite.adapters.base_model import causal_lm
from rmipo_lite.adapters.embeddings import EMBEDDINGS
from rmipo_lite.adapters.start import START
from rmipo_lite.checkpoints.random_state import kept_random_state
from rmipo_lite.model.backbone import dropout_numbers

_OF_ADAPTER = (ADAPTED, EMBEDDINGS, START, "peft_config")  # what peft and we leave on the model
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Put on modules during a run: by accelerate and our own steps, and by transformers' checkpointing.
_PUT_ON_MODULES = (
    "forward", "_original_forward", "gradient_checkpointing", "_gradient_checkpointing_func",
    "_require_grads_hook", "_require_grads_hooks",
)  # fmt: skip


@contextmanager
def surroundings_restored(model: str | nn.Module) -> Iterator[None]:
    """Put back what a run changes; `model` is the caller's own, or a name."""
    environment, filters = dict(os.environ), warnings.filters[:]
    restore_settings = _settings()
    before = None if isinstance(model, str) else _ModelState(model)
    try:
        with kept_random_state():
            yield
    except BaseException:
        if before is not None:
            before.put_modules_back()
        raise
    finally:
        if before is not None:
            before.put_back()
        restore_settings()
        _restore_environment(environment)
        if warnings.filters != filters:
            warnings.filters[:] = filters  # type: ignore[index]
            warnings._filters_mutated()  # type: ignore[attr-defined]


def _settings() -> Callable[[], None]:
    """Note what full_determinism and log_level set for the whole process; the call puts it back."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    verbosity = logging.get_verbosity()

    def restore() -> None:
        if torch.are_deterministic_algorithms_enabled() != deterministic:
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
        logging.set_verbosity(verbosity)

    return restore


def _restore_environment(before: dict[str, str]) -> None:
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    for name, value in before.items():
        if os.environ.get(name) != value:
            os.environ[name] = value


class _ModelState:
    """How a model was before the run."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        base = causal_lm(model)
        self._modules = [(module, dict(module._modules)) for module in model.modules()]
        self._adapted = {name: vars(base)[name] for name in _OF_ADAPTER if name in vars(base)}
        self._trained = [(p, p.requires_grad) for p in model.parameters()]
        self._hooks = {key for hooks in _hooks(model) for key in hooks}
        self._attention = base.config._attn_implementation
        self._had = [
            (module, {name for name in _PUT_ON_MODULES if name in vars(module)})
            for module in model.modules()
        ]
        self._values: list[tuple[Any, str, Any]] = [
            (base.config, "use_cache", getattr(base.config, "use_cache", None)),
            (base, "generation_config", base.generation_config),
        ]
        # transformers' Trainer sets them to the tokenizer's, before 5.20 even where they agree.
        for config in filter(None, (base.config, base.generation_config)):
            self._values += [(config, name, getattr(config, name, None)) for name in _TOKENS]
        for module in model.modules():
            self._values.append((module, "training", module.training))
            for name in ("gradient_checkpointing", "p", *dropout_numbers(module)):
                if isinstance(vars(module).get(name), (bool, float)):
                    self._note(module, name)

    def _note(self, module: nn.Module, name: str) -> None:
        self._values.append((module, name, getattr(module, name)))

    def put_modules_back(self) -> None:
        """The modules as they were, whatever stands in their places now."""
        adapted = vars(causal_lm(self._model)).get(ADAPTED)
        if adapted is not None and START in vars(causal_lm(adapted)) and START not in self._adapted:
            detach_adapter(adapted)  # which puts back what it took out of the base
        _restore_modules(self._modules)
        base = vars(causal_lm(self._model))
        for name in _OF_ADAPTER:
            base.pop(name, None)
        base.update(self._adapted)
        for parameter, trained in self._trained:
            parameter.requires_grad_(trained)

    def put_back(self) -> None:
        """Everything but the adapter."""
        base = causal_lm(self._model)
        # Of checkpointing and of debug='underflow_overflow', also on an adapter that stays.
        _drop_hooks(vars(base).get(ADAPTED, self._model), self._hooks)
        for module, names in self._had:
            for name in _PUT_ON_MODULES:
                if name not in names:
                    vars(module).pop(name, None)
        if base.config._attn_implementation != self._attention:
            base.set_attn_implementation(self._attention)
        for owner, name, value in self._values:
            setattr(owner, name, value)


def _restore_modules(before: list[tuple[nn.Module, dict[str, nn.Module | None]]]) -> None:
    """Not by peft's unload(): cut short inside peft, a run leaves layers without a PeftModel."""
    for module, children in before:
        module._modules.clear()
        module._modules.update(children)


def _drop_hooks(model: nn.Module, kept: set[int]) -> None:
    for hooks in _hooks(model):
        for key in hooks.keys() - kept:
            del hooks[key]


def _hooks(model: nn.Module) -> Iterator[dict[int, Any]]:
    """Every module's forward hooks, by keys that no two hooks of a process share."""
    for module in model.modules():
        yield module._forward_hooks
        yield module._forward_pre_hooks


def unwrap_forward(model: nn.Module) -> None:
    """Take off the autocast that accelerate wraps around a model's forward, for good."""
    original = vars(model).pop("_original_forward", None)
    if original is None:
        return
    if getattr(original, "__func__", None) is type(model).forward:
        del model.forward
    else:  # someone else's own wrapper was there before
        model.forward = original


@contextmanager
def nothing_held() -> Iterator[None]:
    """Decorate a function with it, called: nothing of its work stays in memory but its result.

    Trainer, optimizer and accelerator hold each other in circles. And notebooks keep the last
    traceback, whose frames hold model, optimizer and activations; a `with` block in the function
    itself would be too early, since its own frame still runs then.
    """
    try:
        yield
    except BaseException as error:
        clear_frames(error)
        raise
    finally:
        gc.collect()


def clear_frames(error: BaseException) -> None:
    """Let go of what the frames of an exception hold, causes included.

    Notebooks keep the last traceback, and with it model, optimizer and activations.
    """
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        current = pending.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        traceback.clear_frames(current.__traceback__)
        pending += [current.__cause__, current.__context__]
