"""bitsandbytes, which peft imports whether anybody wants 4 bits or not: in less time, and quietly.

It marks functions for torch.compile as it is imported, and that loads the whole compiler: a second
of every start, for functions that hardly anybody calls. And it advises to download a CPU kernel
that this package keeps its layers off (`loading.protect_4bit_on_cpu`). So its import alone finds a
`torch.compile` that compiles at the first call, and nobody reads the advice.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_NAME = "bitsandbytes"


def ease_bitsandbytes() -> None:
    """From here on; nothing where it is imported already."""
    is_there = any(isinstance(finder, _Easing) for finder in sys.meta_path)
    if _NAME not in sys.modules and not is_there:
        sys.meta_path.insert(0, _Easing())


class _Easing(MetaPathFinder):
    """Finds bitsandbytes where it is, once, and lets it run in the way above."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _NAME:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            setattr(spec.loader, "exec_module", _eased(spec.loader.exec_module))  # noqa: B010
        return spec


def _eased(run: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
    def exec_module(module: ModuleType) -> None:
        import logging

        import torch

        whole, logger = torch.compile, logging.getLogger(f"{_NAME}.backends.cpu.ops")
        torch.compile = _at_first_call(whole)
        logger.addFilter(_is_no_advice)
        try:
            run(module)
        finally:
            torch.compile = whole
            logger.removeFilter(_is_no_advice)

    return exec_module


def _at_first_call(whole: Any) -> Any:
    """`torch.compile` that leaves its work until the function is called."""
    from functools import partial, wraps

    def compile_later(function: Any = None, **options: Any) -> Any:
        if function is None:
            return partial(compile_later, **options)
        compiled: list[Any] = []

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not compiled:
                compiled.append(whole(function, **options))
            return compiled[0](*args, **kwargs)

        return call

    return compile_later


def _is_no_advice(record: Any) -> bool:
    return "gemm_4bit_forward" not in record.getMessage()
