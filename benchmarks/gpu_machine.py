"""What a machine has for `gpu_check.sh`: its card, its tools, and the packages that are needed.

Exit code 1 where a package that rmipo_lite depends on is missing or too old. That others to measure
against are missing is said and is no fault.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

import torch
from packaging.requirements import Requirement

from benchmarks import ROOT
from rmipo_lite.output.console import say

_TOOLS = (("nvidia-smi", "-L"), ("nvcc", "--version"), ("compute-sanitizer", "--version"))


def lacking(requirements: Iterable[str]) -> list[str]:
    """Those of the requirements that aren't met here, each with what is; says every version."""
    unmet = []
    for text in requirements:
        wanted = Requirement(text)
        try:
            found = version(wanted.name)
        except PackageNotFoundError:
            found = None
        say(f"{wanted.name} {found or 'absent'}")
        if found is None or not wanted.specifier.contains(found, prereleases=True):
            unmet.append(f"{text}: {found or 'absent'}")
    return unmet


def main() -> int:
    """Say all of it."""
    say(f"{platform.platform()}, Python {platform.python_version()}, torch {torch.__version__}")
    for tool, option in _TOOLS:
        path = shutil.which(tool)
        say(f"{tool} {path or 'absent'}")
        if path:
            done = subprocess.run([path, option], capture_output=True, text=True, check=False)
            say(done.stdout)
    if torch.cuda.is_available():
        say(str(torch.cuda.get_device_properties(0)))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lacking([*extras["test"], *extras["bench"]])
    unmet = lacking(project["dependencies"])
    for text in unmet:
        say(f"wanted {text}")
    return int(bool(unmet))


if __name__ == "__main__":
    sys.exit(main())
