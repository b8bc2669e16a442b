"""Any preference dataset becomes rows {prompt, chosen, rejected}, every one accounted for.

`rows.load_rows` gives rows and a `report.DataReport`; `holdout` puts some aside.
"""

__all__ = ["columns", "files", "holdout", "normalise", "report", "rows"]
