"""How many tokens go through the model at once: `max_tokens_per_microstep="auto"`.

The head never holds logits, so what a micro-step costs is its activations. The estimate is a count
over the model's shape, on the safe side of what was measured (tests/test_budget.py); where it errs
all the same, `step.py` halves the budget and repeats the step. Checkpointing is a last resort: it
costs a second forward pass, and goes on where the longest pair would not fit without.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn

from rmipo_lite.config import RMiPOConfig
from rmipo_lite.device_memory import free_bytes
from rmipo_lite.model import can_checkpoint, causal_lm, device_of, read_head
from rmipo_lite.ops import head_buffer_bytes

# On the CPU larger micro-steps stop paying once the matrix products are long enough.
_MOST_ON_CPU = 4096
_LEAST, _MOST = 512, 32768
# Of the free memory; the rest is for fragmentation and what other programs will want.
_ACTIVATIONS_SHARE = 0.6
# Activations a transformer block keeps for its backward pass, in multiples of hidden size (norms,
# q, k, v, attention output, residuals) and of the MLP's inner size (gate, up, their product), and
# the gradients that pass through it. Measured on a Llama: 12 to 14 and 4, without those gradients.
_HIDDEN_COPIES, _INNER_COPIES = 16, 5
_CUDA_TEXTS = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
# Gradient and AdamW's two moments of a trained weight, fp32.
_TRAINED_BYTES = 12


@dataclass(frozen=True)
class MicroStepPlan:
    """What a micro-step may hold, and whether activations are computed again in backward."""

    max_tokens: int
    checkpointing: bool


def plan_micro_steps(model: nn.Module, args: RMiPOConfig, longest: int) -> MicroStepPlan:
    """Resolve `max_tokens_per_microstep` and, where it is left open, checkpointing.

    `longest` is what the longest pair takes alone, tokens: a pair can't be cut.
    """
    room = max(0.0, _ACTIVATIONS_SHARE * free_bytes(device_of(model)) - fixed_bytes(model))
    asked = args.max_tokens_per_microstep
    checkpointing = args.wants_checkpointing
    if args.checkpointing_is_open and can_checkpoint(model):
        checkpointing = longest > room / activation_bytes_per_token(model, args, False)
    if isinstance(asked, int):
        return MicroStepPlan(asked, checkpointing)
    fits = int(room / activation_bytes_per_token(model, args, checkpointing))
    most = _MOST if device_of(model).type == "cuda" else _MOST_ON_CPU
    return MicroStepPlan(min(max(fits, _LEAST), most), checkpointing)


def fixed_bytes(model: nn.Module) -> int:
    """What a step takes whatever its tokens: gradients, optimizer, the head's buffer."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return _TRAINED_BYTES * trained + head_buffer_bytes(read_head(model).weight)


def activation_bytes_per_token(model: nn.Module, args: RMiPOConfig, checkpointing: bool) -> int:
    """Bytes that one token's activations take until the backward pass."""
    config = causal_lm(model).config.get_text_config()
    hidden = int(config.hidden_size)
    inner = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    itemsize = 2 if args.bf16 or args.fp16 else 4
    layers = int(config.num_hidden_layers)
    block = (_HIDDEN_COPIES * hidden + _INNER_COPIES * inner) * itemsize
    if checkpointing:
        # Only every block's input is kept, and one block's activations at a time.
        return layers * hidden * itemsize + block
    return layers * block


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the device's memory ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if not isinstance(error, RuntimeError):
        return False
    text = str(error)
    if "CUDNN_STATUS_NOT_SUPPORTED" in text:  # accelerate counts it; a smaller step won't cure it
        return False
    return should_reduce_batch_size(error) or any(words in text for words in _CUDA_TEXTS)
