"""`SharesSteps`: a transformers Trainer whose processes share the pairs of every step.

transformers gives every process batches of its own and lets DDP's hooks add gradients up while they
are computed. Here all draw the same step, `step.together` shares its pairs out by tokens, and what
was computed is added up once, so that a step is the same whatever the number of processes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from rmipo_lite.checkpoints.trainer_mixin import TrainerBeside
from rmipo_lite.checkpoints.weights import fingerprint
from rmipo_lite.config import RMiPOConfig
from rmipo_lite.model.backbone import devices_of, is_spread
from rmipo_lite.output.console import say
from rmipo_lite.parallel.group import Group

_FLAGS = (
    "should_log", "should_evaluate", "should_save", "should_training_stop", "should_epoch_stop",
)  # fmt: skip
_FEW = 8  # pairs a process, below which the shares are uneven


def say_how_many(args: RMiPOConfig, group: Group) -> None:
    """One line about the processes, where there are several."""
    if group.size == 1:
        return
    pairs = args.pairs_per_step
    say(f"{group.size} processes share the {pairs} pairs of every step")
    if pairs < _FEW * group.size:
        say(
            f"WARNING: that is {pairs / group.size:.2g} pairs a process, whose work is uneven "
            "then; a larger per_device_train_batch_size (it counts the pairs of all of them) "
            "keeps them busy"
        )


def begin_alike(model: nn.Module, group: Group, shards: bool = False) -> None:
    """Trained weights as the first process has them; the frozen ones are compared.

    Raises:
        ValueError: these are another model's.
    """
    if group.size == 1:
        return
    weights = list(model.named_parameters())
    # To be shared out, a model may have been loaded by the first alone (accelerate's way).
    spreads_all = shards and not hasattr(model, "hf_quantizer")
    group.spread(weight for _, weight in weights if weight.requires_grad or spreads_all)
    found = group.gather(fingerprint((n, w) for n, w in weights if not w.requires_grad))
    other = [rank for rank, digest in enumerate(found) if digest != found[0]]
    if other:
        raise ValueError(
            f"model: the frozen weights of process {other[0]} are others than the first's; "
            "every process must load the same model"
        )


def take_first_card(args: RMiPOConfig, model: nn.Module) -> None:
    """One process trains on one card; where more are seen, say how to use them all.

    A model whose layers are on several has its way already, and it is said what that means.
    """
    if is_spread(model):
        args._n_gpu = 1  # else transformers would copy it to every card
        say(
            f"The model's layers are on {len(devices_of(model))} devices: a row goes through them "
            "in turn, and one of them works at a time"
        )
    if args.world_size > 1 or args.n_gpu <= 1:
        return
    say(
        f"{args.n_gpu} GPUs are here and one process, which uses the first. To use all: torchrun "
        f"--nproc_per_node {args.n_gpu} script.py, or rmipo-lite train --num_processes {args.n_gpu}"
    )
    args._n_gpu = 1


class SharesSteps(TrainerBeside):
    """Mixin for `transformers.Trainer`; put it before Trainer in the bases."""

    _train_batch_size: int

    def create_accelerator_and_postprocess(self) -> None:
        """No DDP around the model: its hooks would add up gradients in the middle of a step."""
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        if Group.current().size > 1:
            prepare = self.accelerator.prepare_model
            self.accelerator.prepare_model = partial(prepare, evaluation_mode=True)

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Whole steps on every process; accelerate would give each other ones."""
        dataloader = super()._get_dataloader(*args, **kwargs)  # type: ignore[misc]
        shard: Any = getattr(dataloader, "batch_sampler", None)
        if hasattr(shard, "num_processes"):
            shard.num_processes, shard.process_index, shard.even_batches = 1, 0, False
        return dataloader

    def get_total_train_batch_size(self, args: Any) -> int:
        """Pairs of an optimizer step, whatever the number of processes."""
        return int(self._train_batch_size) * int(args.gradient_accumulation_steps)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """What one process's callbacks ask for, all do: one alone would wait for the others."""
        group = Group.current()
        if group.size > 1:
            asked = group.any_of([getattr(self.control, name) for name in _FLAGS])
            for name, flag in zip(_FLAGS, asked, strict=True):
                setattr(self.control, name, flag)
        super()._maybe_log_save_evaluate(*args, **kwargs)  # type: ignore[misc]
