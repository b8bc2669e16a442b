"""The embedded default: a tiny model, preference pairs and a true reward; no network needed.

Hands on model and rows here, the demo itself as `run.demo`.
"""

from rmipo_lite.demo.data import MODEL, easy_rows, length_biased_rows, load_rows, noisy_rows

__all__ = [
    "MODEL", "data", "easy_rows", "length_biased_rows", "load_rows", "noisy_rows", "run",
    "scoring", "task",
]  # fmt: skip
