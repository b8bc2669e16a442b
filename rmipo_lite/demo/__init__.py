"""The embedded default: a tiny model, preference pairs and a true reward; no network needed.

Hands on model and rows here, the demo itself as `run.demo`.
"""

from rmipo_lite.demo.data import MODEL, length_biased_rows, load_rows

__all__ = ["MODEL", "data", "length_biased_rows", "load_rows", "run", "scoring", "task"]
