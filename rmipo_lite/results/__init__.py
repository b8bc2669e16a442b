"""What a run was and what can be done with it: answers, reports, files.

`result.TrainResult` is what `train()` returns; `loaded.load_run` reads a run's folder again.
"""

__all__ = [
    "agreement", "comparison", "conversation", "figures", "judged", "loaded", "model_card",
    "record", "result", "run_file", "run_page", "trained",
]  # fmt: skip
