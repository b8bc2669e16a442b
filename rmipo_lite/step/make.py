"""A `PairStep` for a model and its data: what the run decides by looking at both."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from rmipo_lite.config import RMiPOConfig
from rmipo_lite.model import batch
from rmipo_lite.model.backbone import device_of, is_spread, scored_hidden
from rmipo_lite.model.packing_check import packing_problem, sample_of
from rmipo_lite.output.console import say
from rmipo_lite.parallel.group import Group
from rmipo_lite.planning.budget import plan_micro_steps
from rmipo_lite.step.fused_layers import Layers, find_fused
from rmipo_lite.step.losses import memory_of
from rmipo_lite.step.pair_step import PairStep
from rmipo_lite.tokens.pair import TokenizedPair


def make_step(
    model: nn.Module,
    args: RMiPOConfig,
    pairs: Sequence[TokenizedPair],
    *,
    tokenizer: PreTrainedTokenizerBase,
    prior_front: Sequence[int] = (),
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> PairStep:
    """A `PairStep` for this model and data: packing where the self-check allows it, and a budget.

    What it decides against the options it says in one line.

    Args:
        model: the model as it will run.
        args: the options of the run.
        pairs: what will run, or some of it: the self-check takes its sample from them, and the
            longest decides on checkpointing. None at all: nothing is checked.
        tokenizer: for the token that fills padded rows.
        prior_front: as for `PairStep`.
        autocast: as for `PairStep`.

    Raises:
        UnsupportedModelError: our head disagrees with the model's own logits.
        RuntimeError: the kernels, or this device's products, are wrong.
    """
    group = Group.current()  # what one process can't do, none does
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    pad_id = next(i for i in ids if i is not None)
    packing = args.packing
    if packing and pairs:
        say("Checking packed batches against padded ones")
        found = group.gather(packing_problem(model, pairs, args.kernel_impl, pad_id))
        problem = next(filter(None, found), None)
        if problem is not None:
            packing = False
            say(f"Packed batches are off for this model, padded ones are used: {problem}")
    longest = max((batch.micro_step_tokens([pair], packing) for pair in pairs), default=0)
    plan = plan_micro_steps(model, args, longest, group.on_this_machine)
    step = PairStep(
        model=model,
        args=args,
        max_tokens=group.least(plan.max_tokens),
        max_tokens_no_grad=group.least(plan.max_tokens_no_grad),
        packing=packing,
        prior_front=prior_front,
        pad_id=pad_id,
        autocast=autocast,
        memory=memory_of(args),
        fused_layers=_fused_layers(model, args, pairs, pad_id, autocast),
    )
    checkpointing = plan.checkpointing
    if group.any(bool(checkpointing.asked)):
        step.enable_checkpointing()
        if args.checkpointing_is_open:
            say(f"Checkpointing is on: a pair of {longest} tokens would not fit without")
    elif checkpointing.asked is None:
        step.enable_checkpointing(checkpointing)
        whole = checkpointing.kept.tokens_in(checkpointing.room)
        say(
            f"Checkpointing is on where a micro-step has more than {whole} tokens, in as many "
            f"layers as it needs; the longest pair has {longest}"
        )
    return step


def _fused_layers(
    model: nn.Module,
    args: RMiPOConfig,
    pairs: Sequence[TokenizedPair],
    pad_id: int,
    autocast: Callable[[], AbstractContextManager[object]],
) -> Layers:
    """Layers that liger-kernel computes; none of a model in parts."""
    if args.fused_layers == "off" or not pairs or args.shards_layers or is_spread(model):
        return []
    device = device_of(model)
    inputs = batch.policy_input(sample_of(pairs), packing=False, pad_id=pad_id).to(device)

    def run() -> None:
        with autocast():
            scored_hidden(model, inputs)

    return find_fused(model, device, run)


def autocast_of(
    args: RMiPOConfig, device: torch.device
) -> Callable[[], AbstractContextManager[object]]:
    """The precision that training would compute in."""
    if not (args.bf16 or args.fp16):
        return nullcontext
    return partial(torch.autocast, device.type, torch.bfloat16 if args.bf16 else torch.float16)
