"""The methods beside RMiPO: losses of summed log-probs, most of them against a reference model.

`table` has every method by name, `formulas` their formulas, `memory` what some of them carry from
step to step, `sums` what these are given.
"""

from rmipo_lite.methods import formulas, memory, sums, table

__all__ = ["formulas", "memory", "sums", "table"]
