"""What an option may be: its type from the annotation, its meaning from a table.

Hands on `types` (a value against its annotation) and `inherited` (transformers' own options).
"""

__all__ = ["inherited", "types"]
