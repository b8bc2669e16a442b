"""The embedded default: a tiny model, preference pairs and a true reward; no network needed."""

from rmipo_lite.demo.data import MODEL, length_biased_rows, load_rows

__all__ = ["MODEL", "length_biased_rows", "load_rows"]
