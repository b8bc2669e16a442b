"""Folders that are whole or not there: sealed by a manifest, written without pickle.

`sealed_folder` finds the newest that verifies, `trainer_mixin` gives a Trainer the saving.
"""

__all__ = ["random_state", "sealed_folder", "state", "trainer_mixin", "weights"]
