"""A run of steps: the trainer, its evaluations, rate and plan, interruption and resuming.

`trainer.RMiPOTrainer` trains.
"""

__all__ = [
    "interrupt",
    "known_before",
    "learning_rate",
    "refusals",
    "rehearsal",
    "restore",
    "run_log",
    "sharding",
    "trainer",
]
