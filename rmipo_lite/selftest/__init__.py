"""Does it work on this machine: what depends on its processor, card, disk, compiler, libraries.

`run.selftest` tries it; `scorecard` and `parts`, the frame and tiny models, serve the tests too.
"""

__all__ = ["command", "gpu", "models", "parts", "processes", "run", "scorecard", "survival"]
