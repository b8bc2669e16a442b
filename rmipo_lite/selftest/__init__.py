"""Does it work on this machine: what depends on its processor, card, disk, compiler, libraries.

`run.selftest` tries it; `parts`, its tiny models, serves the tests too.
"""

__all__ = ["check", "command", "gpu", "models", "parts", "processes", "run", "survival"]
