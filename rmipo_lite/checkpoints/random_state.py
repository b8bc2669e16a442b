"""The state of every random generator that training uses: read, put back, kept over a block."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from rmipo_lite.ops.devices import gpus


def random_state() -> dict[str, Any]:
    """The state of every random generator that training uses: Python, numpy, torch, devices."""
    # The legacy generator is what transformers seeds and what user code draws from.
    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002
        "torch": torch.get_rng_state(),
    }
    for name, module in gpus().items():
        state[name] = [module.get_rng_state(index) for index in range(module.device_count())]
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put every random generator back to a state from `random_state`.

    A checkpoint from a machine with another number of GPUs restores as many as there are.
    """
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    for name, module in gpus().items():
        for index, device_state in enumerate(state.get(name, [])[: module.device_count()]):
            module.set_rng_state(device_state, index)


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Whatever draws random numbers inside the block, the next number after it is the same."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)
