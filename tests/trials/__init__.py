"""The reliability scorecard: it tries to lose a run, a thousand times, and counts its losses.

    python -m tests.trials                            # a tenth of the trials, minutes
    python -m tests.trials --trials all --table docs/promises.md
    pytest tests/trials -m trial                      # the same, a test a check

Beside each check stand tests of it: that it finds a fault planted in the package.
"""
