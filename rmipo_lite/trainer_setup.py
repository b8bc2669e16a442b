"""What a run is refused for, and what its options come to, before a trainer is made."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import chain
from typing import Any, cast

from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from rmipo_lite.adapter_files import non_finite_weight
from rmipo_lite.config import RMiPOConfig, TokenizationMode, TruncationMode
from rmipo_lite.display import say
from rmipo_lite.model import causal_lm
from rmipo_lite.tokenization import TokenizationOptions, TokenizedPair


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


def tokenization_options(args: RMiPOConfig, model: nn.Module) -> TokenizationOptions:
    """The run's tokenisation, `max_length` clamped to the model's context (with one line)."""
    return options_for(args, causal_lm(model).config)


def options_for(args: RMiPOConfig, config: PretrainedConfig) -> TokenizationOptions:
    """The same for a model of which only the config is there."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    max_length = args.max_length
    if context is not None and (max_length is None or max_length > context):
        if max_length is not None:
            say(f"max_length {max_length} is more than the model's context: {context} is used")
        max_length = int(context)
    return TokenizationOptions(
        mode=cast(TokenizationMode, args.tokenization),
        max_length=max_length,
        max_prompt_length=args.max_prompt_length,
        truncation_mode=cast(TruncationMode, args.truncation_mode),
        chat_template=args.chat_template,
        num_proc=args.dataset_num_proc,
    )


def prior_bos_id(args: RMiPOConfig, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token in front of a bare response, None for `prior_context="none"`.

    Raises:
        ValueError: "bos" with a tokenizer that has none.
    """
    if args.prior_context == "none":
        return None
    if tokenizer.bos_token_id is None:
        raise ValueError(
            "prior_context='bos' needs a tokenizer with a BOS token, and this one has none; use "
            "prior_context='none'"
        )
    return int(tokenizer.bos_token_id)


def whole_step_batches(args: RMiPOConfig) -> RMiPOConfig:
    """A copy whose dataloader batch is one optimizer step; the caller's own stays as it is."""
    whole = copy.copy(args)
    whole.per_device_train_batch_size = args.pairs_per_step
    whole.gradient_accumulation_steps = 1
    return whole


def is_tokenized(dataset: Any) -> bool:
    """Whether these are pairs of ids already."""
    return (
        isinstance(dataset, Sequence)
        and len(dataset) > 0
        and all(isinstance(pair, TokenizedPair) for pair in dataset)
    )


def refuse_several_devices(args: RMiPOConfig) -> None:
    """Raise ValueError for more than one process or GPU."""
    if args.world_size > 1 or args.n_gpu > 1:
        raise ValueError(
            f"one process on one device: this run has {args.world_size} processes and "
            f"{args.n_gpu} GPUs visible. Start it without a launcher and set "
            "CUDA_VISIBLE_DEVICES=0; several devices are refused until they are proven"
        )
