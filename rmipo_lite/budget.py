"""How many tokens go through the model at once: `max_tokens_per_microstep="auto"`.

The head never holds logits, so what a micro-step costs is its activations. The estimate is a count
over the model's shape; it need not be exact, only on the safe side of the free memory.
"""

from __future__ import annotations

import torch
from torch import nn

from rmipo_lite.config import RMiPOConfig
from rmipo_lite.model import causal_lm, device_of

# On the CPU larger micro-steps stop paying once the matrix products are long enough.
_CPU_TOKENS = 4096
_LEAST, _MOST = 512, 32768
# Of the free memory; the rest is for the head's chunk, gradients, the optimizer and fragmentation.
_ACTIVATIONS_SHARE = 0.6
# Activations a transformer block keeps for its backward pass, in multiples of hidden size (norms,
# q, k, v, attention output, residuals) and of the MLP's inner size (gate, up, their product).
_HIDDEN_COPIES, _INNER_COPIES = 16, 5


def resolve_token_budget(model: nn.Module, args: RMiPOConfig) -> int:
    """Tokens of a micro-step: the number that was asked for, or one that fits the free memory."""
    if isinstance(args.max_tokens_per_microstep, int):
        return args.max_tokens_per_microstep
    device = device_of(model)
    if device.type != "cuda":
        return _CPU_TOKENS
    free, _ = torch.cuda.mem_get_info(device)
    fits = int(free * _ACTIVATIONS_SHARE / activation_bytes_per_token(model, args))
    return min(max(fits, _LEAST), _MOST)


def activation_bytes_per_token(model: nn.Module, args: RMiPOConfig) -> int:
    """Bytes that one token's activations take until the backward pass."""
    config = causal_lm(model).config.get_text_config()
    hidden = int(config.hidden_size)
    inner = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    itemsize = 2 if args.bf16 or args.fp16 else 4
    layers = int(config.num_hidden_layers)
    block = (_HIDDEN_COPIES * hidden + _INNER_COPIES * inner) * itemsize
    if args.wants_checkpointing:
        # Only every block's input is kept, and one block's activations at a time.
        return layers * hidden * itemsize + block
    return layers * block
