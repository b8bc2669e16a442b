"""What a run was and what can be done with it: answers, reports, files.

`result.TrainResult` is what `train()` returns.
"""

__all__ = ["agreement", "comparison", "model_card", "record", "result", "run_page"]
