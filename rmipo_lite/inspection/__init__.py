"""Preference pairs looked at before training, as texts, as tokens and under a model.

`inspection.inspect` returns an `Inspection`.
"""

__all__ = ["inspection"]
