"""The package's version, once; it stands apart so that every room can read it."""

__version__ = "0.1.0"
