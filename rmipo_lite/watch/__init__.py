"""A run seen while it goes on: progress in whatever the output is, and a doctor.

`progress.show_progress` draws, `doctor.Doctor` finds, `completions` measures answers.
"""

__all__ = ["completions", "doctor", "progress", "symptoms"]
