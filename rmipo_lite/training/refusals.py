"""What a run is refused for before a trainer is made."""

import copy
from collections.abc import Sequence
from itertools import chain

from torch import nn

from rmipo_lite.checkpoints.weights import non_finite_weight
from rmipo_lite.config import RMiPOConfig
from rmipo_lite.model.backbone import causal_lm
from rmipo_lite.tokens.pair import TokenizedPair


def refuse_bad_weights(model: nn.Module, when: str = "") -> None:
    """Raise where a weight is NaN or inf: no pair is to blame then, and nothing can be learnt."""
    name = non_finite_weight(model)
    if name is not None:
        raise FloatingPointError(
            f"{when}model: the weight {name} holds NaN or inf, so every loss would. Load the model "
            "again, or resume from the last checkpoint"
        )


def refuse_other_options(args: object) -> None:
    """Raise TypeError for options that aren't ours."""
    if not isinstance(args, RMiPOConfig):
        raise TypeError(
            f"args: wanted an RMiPOConfig, got {type(args).__name__}; it has the options of "
            "TrainingArguments and its own: RMiPOConfig(output_dir, beta=2.0)"
        )


def refuse_other_vocabulary(pairs: Sequence[TokenizedPair], model: nn.Module) -> None:
    """Raise ValueError for a token that the model has no embedding for."""
    size = next(causal_lm(model).get_input_embeddings().parameters()).shape[0]
    for pair in pairs:
        highest = max(chain(pair.prompt_ids, pair.chosen_ids, pair.rejected_ids))
        if highest >= size:
            raise ValueError(
                f"tokenizer: it gives token {highest} (row {pair.row}), and the model's vocabulary "
                f"has {size}; use the model's own tokenizer"
            )


def whole_step_batches(args: RMiPOConfig) -> RMiPOConfig:
    """A copy whose dataloader batch is one optimizer step; the caller's own stays as it is."""
    whole = copy.copy(args)
    whole.per_device_train_batch_size = args.pairs_per_step
    whole.gradient_accumulation_steps = 1
    return whole


def refuse_several_devices(args: RMiPOConfig) -> None:
    """Raise ValueError for more than one process or GPU, and for what shards over them."""
    if getattr(args, "deepspeed", None) or getattr(args, "fsdp", None):
        raise ValueError("deepspeed, fsdp: not supported; one process on one device trains here")
    if args.world_size > 1 or args.n_gpu > 1:
        raise ValueError(
            f"one process on one device: this run has {args.world_size} processes and "
            f"{args.n_gpu} GPUs visible. Start it without a launcher and set "
            "CUDA_VISIBLE_DEVICES=0; several devices are refused until they are proven"
        )
