"""The operators: `linear_logps` (the head) and `rmipo_loss` / `pair_loss` (the loss).

They are handed on here, `losses` is the table of losses, `reference` what is correct, `native`
and `library` the kernels, `devices` what they run on.
"""

from rmipo_lite.ops import devices, library, losses, native, reference
from rmipo_lite.ops.head import linear_logps
from rmipo_lite.ops.head_rows import (
    CPU_BUFFER_BYTES,
    PLAIN_BUFFER_BYTES,
    card_buffer_bytes,
    head_buffer_bytes,
)
from rmipo_lite.ops.library import BackendStatus, status
from rmipo_lite.ops.loss import LossOutput, PairLossOutput, pair_loss, rmipo_loss
from rmipo_lite.ops.native import device_flag

__all__ = [
    "CPU_BUFFER_BYTES", "PLAIN_BUFFER_BYTES", "BackendStatus", "LossOutput", "PairLossOutput",
    "card_buffer_bytes", "device_flag", "devices", "head_buffer_bytes", "library", "linear_logps",
    "losses", "native", "pair_loss", "reference", "rmipo_loss", "status",
]  # fmt: skip
