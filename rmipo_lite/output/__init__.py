"""How things are shown: lines, tables, pages, plots, findings; it knows nothing of models.

`console.say` prints, `page` and `table` make HTML and text, `redaction` keeps secrets out.
"""

__all__ = ["console", "findings", "held_out", "page", "plots", "redaction", "table"]
