"""Any preference dataset becomes rows {prompt, chosen, rejected}, every one accounted for.

`load_rows` gives rows and a `report.DataReport`; `holdout` puts some aside.
"""

from rmipo_lite.data.rows import load_rows

__all__ = [
    "columns",
    "files",
    "holdout",
    "length_balance",
    "load_rows",
    "mixture",
    "normalise",
    "report",
    "rows",
    "sources",
    "unpaired",
]
