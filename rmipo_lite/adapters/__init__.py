"""Adapters, by peft's own accessors: attached, gone on with, taken off, saved and loaded whole.

`lora` says which, `attach` gives it to a model, `start` knows that at step 0, `saved` its files.
"""

__all__ = ["attach", "base_model", "embeddings", "lora", "merge", "saved", "start"]
