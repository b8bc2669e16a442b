"""float16 ends at 65,504, and some models' hidden states don't.

On a card without bfloat16 their weights are float32, and so are hidden states and norms, while
products stay in float16; where a product itself leaves the range, everything is float32. Families
that are known for it are seen from their config, before anything is loaded; any other model by a
forward pass. What somebody asked for stays: a model that gives NaN in it is refused
(`model.head_check`).
"""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PretrainedConfig

from rmipo_lite.config import RMiPOConfig
from rmipo_lite.model import batch
from rmipo_lite.model.backbone import device_of, evaluating, scored_hidden
from rmipo_lite.model.loading import load_config
from rmipo_lite.output.console import say
from rmipo_lite.tokens.pair import TokenizedPair

# Gemma 3's hidden states pass 1e5 (measured in float32 on the 270M model); 3n is built alike.
BEYOND_HALF = {"gemma3", "gemma3_text", "gemma3n", "gemma3n_text"}
_PAIRS, _TOKENS = 4, 256  # that are looked at, and of a side
_WEIGHTS = (
    "leave float16's range, and this card has no bfloat16: weights and hidden states are float32, "
    "which takes up to twice the memory, and products float16"
)
_ALL = "Its products leave it too: the run computes in float32, at about a third of float16's speed"


def is_beyond_half(config: PretrainedConfig) -> bool:
    """Whether the family is known to leave float16's range."""
    return bool({config.model_type, config.get_text_config().model_type} & BEYOND_HALF)


def keep_family_in_range(name: str, args: RMiPOConfig) -> None:
    """Before loading: float32 weights where nobody asked for float16 and the family needs them."""
    if args.half_is_open and is_beyond_half(config := load_config(name)):
        say(f"The hidden states of {config.model_type} models {_WEIGHTS}")
        args.take_float32(weights_alone=True)


def keep_model_in_range(
    model: nn.Module, pairs: Sequence[TokenizedPair], args: RMiPOConfig
) -> None:
    """After loading, likewise, where a forward pass of some pairs overflows."""
    if not args.half_is_open or not pairs:
        return
    if not isinstance(getattr(model, "hf_device_map", None), dict):
        model.to(args.device)
    if not leaves_half(model, pairs):
        return
    if args.weights_dtype != torch.float32:
        say(f"This model's hidden states {_WEIGHTS}")
        args.take_float32(weights_alone=True)
        model.float()
        if not leaves_half(model, pairs):
            return
    say(_ALL)
    args.take_float32()
    for part in model.modules():
        if isinstance(getattr(part, "compute_dtype", None), torch.dtype):  # bitsandbytes' own
            setattr(part, "compute_dtype", torch.float32)  # noqa: B010, typed as Tensor


@torch.no_grad()
def leaves_half(model: nn.Module, pairs: Sequence[TokenizedPair]) -> bool:
    """Whether a hidden row is not finite when products are in float16."""
    by_length = sorted(pairs, key=batch.packed_length)
    some = [batch.cut_short(pair, _TOKENS) for pair in by_length[len(by_length) // 2 :][:_PAIRS]]
    with evaluating(model), torch.autocast(device_of(model).type, torch.float16):
        inputs = batch.policy_input(some, packing=False).to(device_of(model))
        return not bool(scored_hidden(model, inputs).isfinite().all())
