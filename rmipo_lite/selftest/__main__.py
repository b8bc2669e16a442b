"""`python -m rmipo_lite.selftest`: the same as `rmipo-lite selftest`."""

import argparse
import sys

from rmipo_lite.selftest.command import add_options, run

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="rmipo-lite selftest", allow_abbrev=False)
    add_options(parser)
    sys.exit(run(parser.parse_args()))
