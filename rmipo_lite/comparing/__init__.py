"""Several methods on the same pairs, side by side: `side_by_side.compare` and its `Comparison`.

`contenders` are compared, `judges` say whose answer is better, `worth` what a difference is.
"""

from rmipo_lite.comparing import comparison, side_by_side

__all__ = ["comparison", "side_by_side"]
