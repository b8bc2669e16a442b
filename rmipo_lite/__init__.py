"""RMiPO preference optimization for one consumer GPU: `rmipo_lite.train(model, dataset)`.

The names below are the public surface; everything else may change between versions. They are
imported at first use, so that `import rmipo_lite` costs milliseconds and works without torch's
compiler tool chain.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rmipo_lite.system.imports import ease_bitsandbytes
from rmipo_lite.version import __version__

_HOME = {
    "Comparison": "comparing.comparison",
    "RMiPOConfig": "config",
    "RMiPOTrainer": "training.trainer",
    "TrainResult": "results.result",
    "compare": "comparing.side_by_side",
    "estimate": "planning.estimation",
    "info": "environment",
    "inspect": "inspection.inspection",
    "linear_logps": "ops",
    "load_run": "results.loaded",
    "rmipo_loss": "ops",
    "train": "run",
}

__all__ = [
    "Comparison", "RMiPOConfig", "RMiPOTrainer", "TrainResult", "__version__", "compare",
    "estimate", "info", "inspect", "linear_logps", "load_run", "rmipo_loss", "train",
]  # fmt: skip

ease_bitsandbytes()

if TYPE_CHECKING:
    from rmipo_lite.comparing.comparison import Comparison
    from rmipo_lite.comparing.side_by_side import compare
    from rmipo_lite.config import RMiPOConfig
    from rmipo_lite.environment import info
    from rmipo_lite.inspection.inspection import inspect
    from rmipo_lite.ops import linear_logps, rmipo_loss
    from rmipo_lite.planning.estimation import estimate
    from rmipo_lite.results.loaded import load_run
    from rmipo_lite.results.result import TrainResult
    from rmipo_lite.run import train
    from rmipo_lite.training.trainer import RMiPOTrainer


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rmipo_lite' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"rmipo_lite.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
