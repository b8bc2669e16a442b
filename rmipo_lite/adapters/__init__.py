"""Adapters, by peft's own accessors: attached, gone on with, taken off, saved and loaded whole.

`attach` gives a model its adapter, `start` knows the model at step 0, `saved` its files.
"""

__all__ = ["attach", "base_model", "embeddings", "merge", "saved", "start"]
