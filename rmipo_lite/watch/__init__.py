"""A run seen while it goes on: progress in whatever the output is, and a doctor.

`progress.show_progress` draws, `doctor.Doctor` finds, `completions` measures answers, `chart.Chart`
is what is known so far.
"""

__all__ = ["chart", "completions", "doctor", "progress", "symptoms"]
