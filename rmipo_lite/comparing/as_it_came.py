"""One loaded model for many runs: each begins with it as it came."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

from peft import PeftModel

from rmipo_lite.adapters.attach import ADAPTED, attach_adapter, detach_adapter
from rmipo_lite.adapters.base_model import causal_lm
from rmipo_lite.adapters.lora import Adapter
from rmipo_lite.adapters.start import fill, trained_weights


@contextlib.contextmanager
def as_it_came(model: Any, peft_config: Adapter) -> Iterator[tuple[Any, Callable[[], None]]]:
    """(the model, a call that puts it back as it came), which happens at the end too."""
    base = causal_lm(model)
    ends = base.generation_config
    has_own = isinstance(model, PeftModel) or ADAPTED in vars(base)
    if has_own and peft_config not in ("auto", None):
        raise ValueError("peft_config: this model has an adapter; pass its base for new ones")
    if has_own:  # it goes on, in every run from the same start
        model = attach_adapter(model, peft_config)
    start = trained_weights(model) if has_own or peft_config is None else {}

    def put_back() -> None:
        adapted = vars(base).get(ADAPTED)
        if not has_own and adapted is not None:
            detach_adapter(adapted)
        fill(dict(model.named_parameters()), start)
        model.zero_grad(set_to_none=True)
        gc.collect()

    try:
        yield model, put_back
    finally:
        put_back()
        base.generation_config = ends
