"""The methods beside RMiPO: losses of summed log-probs, most of them against a reference model.

`table` has every method by name, `formulas` their formulas, `sums` what these are given.
"""

from rmipo_lite.methods import formulas, sums, table

__all__ = ["formulas", "sums", "table"]
