"""What a run is refused for before a trainer is made."""

import copy
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase, TrainerCallback

from rmipo_lite.checkpoints.weights import non_finite_weight
from rmipo_lite.config import RMiPOConfig
from rmipo_lite.data.report import name_rows
from rmipo_lite.model.generation import vocabulary_size
from rmipo_lite.parallel.group import Group
from rmipo_lite.tokens.pair import TokenizedPair
from rmipo_lite.training.evaluation import metric_names

_ALONE = Group()


def refuse_bad_weights(model: nn.Module, when: str = "", group: Group = _ALONE) -> None:
    """Raise where a weight is NaN or inf: no pair is to blame then, and nothing can be learnt.

    `group`: those that ask together, each of what it has of the weights.
    """
    name = next(filter(None, group.gather(non_finite_weight(model))), None)
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


def refuse_other_callbacks(callbacks: object) -> None:
    """Raise TypeError for anything but a list of transformers callbacks, or None."""
    if callbacks is None:
        return
    given = callbacks if isinstance(callbacks, list | tuple) else [None]
    kinds = [one if isinstance(one, type) else type(one) for one in given]
    if not all(issubclass(kind, TrainerCallback) for kind in kinds):
        raise TypeError(f"callbacks: wanted a list of transformers callbacks, got {callbacks!r}")


def refuse_other_vocabulary(
    pairs: Sequence[TokenizedPair],
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Raise ValueError for a token, padding too, that the model has no embedding for."""
    size = vocabulary_size(model)
    pad = None if tokenizer is None else tokenizer.pad_token_id
    if tokenizer is not None and pad is not None and pad >= size:
        raise ValueError(
            f"tokenizer: its pad token {tokenizer.pad_token!r} is token {pad}, and the model's "
            f"vocabulary has {size}; call model.resize_token_embeddings(len(tokenizer)), or set "
            "tokenizer.pad_token = tokenizer.eos_token"
        )
    for pair in pairs:
        highest = max(chain(pair.prompt_ids, pair.chosen_ids, pair.rejected_ids))
        if highest >= size:
            raise ValueError(
                f"tokenizer: it gives token {highest} (row {pair.row}), and the model's vocabulary "
                f"has {size}; use the model's own tokenizer"
            )


def refuse_bad_pairs(pairs: Sequence[TokenizedPair], args: RMiPOConfig) -> None:
    """Raise ValueError where no step can be made of them, or two share a number.

    Dropping the last batch may leave none; weights and cached priors go by the number.
    """
    if args.dataloader_drop_last and 0 < len(pairs) < args.pairs_per_step:
        raise ValueError(
            f"dataloader_drop_last: {len(pairs)} pairs are less than one step's "
            f"{args.pairs_per_step}, and all would be dropped; leave it out, or lower "
            "per_device_train_batch_size or gradient_accumulation_steps"
        )
    counts = Counter(pair.row for pair in pairs)
    repeated = [row for row, count in counts.items() if count > 1]
    if repeated:
        raise ValueError(
            f"train_dataset: {len(repeated)} row numbers stand at several pairs (row "
            f"{name_rows(repeated)}); number tokenised pairs anew where lists are joined"
        )


def refuse_coarse_steps(trainer: Any) -> None:
    """Raise ValueError where a found rate's steps would be rounded away by 16-bit weights."""
    if trainer.args.learning_rate != "auto":
        return
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    coarse = sum(p.numel() for p in trained if p.dtype in (torch.bfloat16, torch.float16))
    if 2 * coarse > sum(p.numel() for p in trained):
        raise ValueError(
            "learning_rate='auto': the weights that are trained are in 16 bits, and most steps at "
            "such a rate would be rounded away. Load the model in float32 (dtype=torch.float32), "
            "train an adapter (peft_config='auto'), or pass a number"
        )


def whole_step_batches(args: RMiPOConfig) -> RMiPOConfig:
    """A copy whose dataloader batch is one optimizer step; the caller's own stays as it is."""
    whole = copy.copy(args)
    whole.per_device_train_batch_size = args.pairs_per_step
    whole.gradient_accumulation_steps = 1
    return whole


def refuse_unknown_metric(trainer: Any) -> None:
    """Raise ValueError where the best model would be chosen by a number that nobody measures."""
    args, wanted = trainer.args, trainer.args.metric_for_best_model
    stops_early = any(
        isinstance(callback, EarlyStoppingCallback)
        for callback in trainer.callback_handler.callbacks
    )
    if stops_early and (wanted is None or args.eval_strategy == "no"):
        raise ValueError(
            "callbacks: EarlyStoppingCallback needs metric_for_best_model (such as 'loss') and "
            f"eval_strategy 'steps' or 'epoch'; they are {wanted!r} and {str(args.eval_strategy)!r}"
        )
    if wanted is None or trainer.eval_dataset is None:
        return
    sets = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {}
    known = metric_names(args, [f"{name}_" for name in sets])
    if f"eval_{wanted.removeprefix('eval_')}" not in known:
        shown = ", ".join(name.removeprefix("eval_") for name in known)
        raise ValueError(
            f"metric_for_best_model: no evaluation gives {wanted!r}, wanted one of {shown}"
        )


def refuse_bad_schedule(trainer: Any) -> None:
    """Make optimizer and schedule once and throw them away: a wrong argument shows here.

    Raises:
        ValueError: names the options; what the optimizer or the schedule said follows.
    """
    args, given = trainer.args, (trainer.optimizer, trainer.lr_scheduler)
    kind = str(getattr(args.optim, "value", args.optim))
    if given[0] is None and (kind in ("lomo", "adalomo") or "layerwise" in kind):
        raise ValueError(
            f"optim: {kind} changes weights within the backward pass, and a step has several"
        )
    if given[0] is None:
        _refuse_unread(trainer)
    named = "optim, optim_args"
    try:
        trainer.create_optimizer()
        named = "lr_scheduler_type, lr_scheduler_kwargs, warmup_steps"
        trainer.create_scheduler(10)
    except Exception as error:  # of many packages
        raise ValueError(f"{named}: {type(error).__name__}: {error}") from error
    finally:
        trainer.optimizer, trainer.lr_scheduler = given
        trainer._created_lr_scheduler = False


def _refuse_unread(trainer: Any) -> None:
    """Raise ValueError for a name in `optim_args` that this optimizer's options don't hang on."""
    args, model = copy.copy(trainer.args), trainer.model

    def made(optim_args: str) -> str:
        args.optim_args = optim_args
        try:
            return repr(trainer.get_optimizer_cls_and_kwargs(args, model)[1])
        except Exception as error:  # read, and no such value; or the optimizer can't be had at all
            return repr(error)

    for part in filter(None, (trainer.args.optim_args or "").replace(" ", "").split(",")):
        name = part.partition("=")[0]
        if len({made(tried) for tried in ("", part, f"{name}=1", f"{name}=0.5")}) == 1:
            kind = getattr(args.optim, "value", args.optim)
            raise ValueError(f"optim_args: {kind} has no {name!r}; it would change nothing")
