"""Benchmarks: `python -m benchmarks NAME`, from the project's root; rows go to `<name>.csv` here.

They are no part of the package that is installed.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # where a child process must start to find them
