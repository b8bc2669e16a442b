"""The language model: loaded, adapted, run on packed rows up to its last hidden state.

`batch` makes its input, `backbone.scored_hidden` and `head.read_head` what the loss needs.
"""

__all__ = [
    "attention",
    "backbone",
    "batch",
    "fused_lora",
    "generation",
    "head",
    "loading",
    "model_files",
    "names",
    "packing_check",
    "upstream",
]
