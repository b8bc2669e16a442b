"""A step, and the trainer around it: priors, pair values, log, interrupt, plan.

`step.make_step` runs pairs; `trainer.RMiPOTrainer` trains with it.
"""

__all__ = [
    "interrupt",
    "learning_rate",
    "pair_values",
    "refusals",
    "rehearsal",
    "restore",
    "run_log",
    "step",
    "trainer",
]
