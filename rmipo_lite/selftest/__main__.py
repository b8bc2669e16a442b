"""`python -m rmipo_lite.selftest`: the same as `rmipo-lite selftest`."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    from rmipo_lite.cli.main import main

    sys.exit(main(["selftest", *sys.argv[1:]]))
