"""What only some operating systems have, each with its other way elsewhere, and how Python loads.

Nothing outside this room asks which system it is on, or calls what Windows' or macOS' Python
lacks: the linter flags those names.
"""

__all__ = ["files", "imports", "memory", "processes"]
