"""How things are shown: lines, tables, pages, plots, findings; it knows nothing of models.

`console.say` prints, `page` and `table` make HTML and text, `figures` pictures with captions,
`redaction` keeps secrets out, `uncertainty` says how sure a number is.
"""

__all__ = [
    "console", "figures", "findings", "held_out", "page", "plots", "redaction", "table",
    "uncertainty",
]  # fmt: skip
