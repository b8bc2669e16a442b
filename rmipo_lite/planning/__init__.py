"""Memory and time, before they are taken: what fits, in how large micro-steps, in how many bits.

`budget` and `quantization` decide for a run, `estimation.estimate` tells it beforehand.
"""

__all__ = ["budget", "cards", "device", "estimation", "footprint", "quantization"]
