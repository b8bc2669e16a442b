"""The command line: options made from the config, one function a command.

`main.main` runs it.
"""

__all__ = ["main"]
