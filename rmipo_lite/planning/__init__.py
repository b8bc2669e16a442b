"""What a run takes, before it does: memory, time, micro-steps, bits, and how large a rate.

`budget`, `quantization` and `half_range` decide for a run, `estimation.estimate` tells it
beforehand; `range_test` is the arithmetic of a search that training makes.
"""

__all__ = [
    "budget", "cards", "device", "estimation", "footprint", "half_range", "quantization",
    "range_test",
]  # fmt: skip
