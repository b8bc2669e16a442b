"""Rows become ids: chat template, border, truncation, end token.

`prepare.prepare` gives the `pair.TokenizedPair`s of any dataset.
"""

__all__ = [
    "encoder",
    "ending",
    "one_row",
    "options",
    "pair",
    "prepare",
    "template_limits",
    "templates",
    "tokenize_rows",
]
