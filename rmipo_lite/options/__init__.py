"""What an option may be: its type from the annotation, its meaning from a table.

Hands on `method` (the fields that say which method), `types` (a value against its annotation),
`own` (the config's own options) and `inherited` (transformers' options).
"""

__all__ = ["inherited", "method", "own", "types"]
