"""Work that one process of a machine does for all of it: reading and tokenising a dataset.

The others wait for as long as it takes. A collective would not do: it has a time limit (half an
hour), which is less than a large dataset may take.
"""

from __future__ import annotations

import os
import pickle
import socket
import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from rmipo_lite.parallel.group import Group, carried, tried

T = TypeVar("T")
_POLL_S = 0.05
_calls = count()  # all processes come by the same ones, in the same order


def once_a_machine(make: Callable[[], T]) -> T:
    """What the first process of this machine makes, on all of its processes; its error likewise.

    It goes through a file that the machine's processes share, and nobody else reads.
    """
    group = Group.current()
    if group.size == 1:
        return make()
    store = dist.distributed_c10d._get_default_store()
    key = f"rmipo_lite/once/{socket.gethostname()}/{next(_calls)}"
    if group.rank_here == 0:
        return _made(make, store, key)
    while not store.check([key]):
        time.sleep(_POLL_S)
    path = Path(store.get(key).decode())
    error, made = pickle.loads(path.read_bytes())  # written by the process beside this one
    if store.add(f"{key}/read", 1) == group.on_this_machine - 1:
        path.unlink()
    if error is not None:
        raise error
    return made


def _made(make: Callable[[], T], store: Any, key: str) -> T:
    made, error = tried(make)
    handle, name = tempfile.mkstemp(prefix="rmipo-lite-")  # readable by this user alone
    with os.fdopen(handle, "wb") as file:
        pickle.dump((carried(error), made), file)
    store.set(key, name)
    if error is not None:
        raise error
    return made
