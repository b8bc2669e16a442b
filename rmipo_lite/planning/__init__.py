"""What a run takes, before it does: memory, time, micro-steps, bits, and how large a rate.

`budget` and `quantization` decide for a run, `estimation.estimate` tells it
beforehand; `range_test` is the arithmetic of a search that training makes.
"""

__all__ = ["budget", "cards", "device", "estimation", "footprint", "quantization", "range_test"]
