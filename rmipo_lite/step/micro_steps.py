"""Micro-steps: a list of pairs cut by tokens, and cut again where memory runs out.

Where it does, the budget is halved and the work begins again; a single pair that doesn't fit gets
checkpointing. Nothing is lost or counted twice. Passes without gradients keep no activations, and
have a budget of their own.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from accelerate.utils.memory import clear_device_cache
from torch import nn

from rmipo_lite.checkpoints.random_state import random_state, set_random_state
from rmipo_lite.config import RMiPOConfig
from rmipo_lite.model import batch
from rmipo_lite.model.attention import packed_attention
from rmipo_lite.model.backbone import can_checkpoint, checkpointed_layers, enable_checkpointing
from rmipo_lite.model.fused_lora import fused_lora
from rmipo_lite.output.console import say
from rmipo_lite.parallel.group import Group
from rmipo_lite.parallel.sharded import is_sharded
from rmipo_lite.planning.budget import Checkpointing, is_out_of_memory
from rmipo_lite.step.fused_layers import Layers, replaced
from rmipo_lite.step.gradients import clear_gradients
from rmipo_lite.step.together import share_of
from rmipo_lite.tokens.pair import TokenizedPair

T = TypeVar("T")


@dataclass
class MicroSteps:
    """How a model's passes are cut.

    `max_tokens` is the micro-step's budget, `max_tokens_no_grad` that of passes without gradients;
    `packing` chooses the packed or the padded form.
    """

    model: nn.Module
    args: RMiPOConfig
    max_tokens: int
    packing: bool
    checkpointing: bool = False  # all activations are computed again in the backward pass
    as_needed: Checkpointing | None = None  # or those of a micro-step's layers, by its tokens
    max_tokens_no_grad: int | None = None  # None: max_tokens
    fused_layers: Layers = ()  # that run another forward in a step
    group: Group = field(default_factory=Group.current)  # the processes that share a step
    _running: Sequence[TokenizedPair] = ()  # the micro-step in progress

    def enable_checkpointing(self, as_needed: Checkpointing | None = None) -> None:
        """Compute activations again in the backward pass from now on: all, or as they ask for."""
        enable_checkpointing(self.model)
        self.checkpointing, self.as_needed = as_needed is None, as_needed

    @property
    def budget_no_grad(self) -> int:
        """Tokens of a pass without gradients."""
        return self.max_tokens if self.max_tokens_no_grad is None else self.max_tokens_no_grad

    @property
    def _budget(self) -> int:
        return self.max_tokens if torch.is_grad_enabled() else self.budget_no_grad

    def _split(self, pairs: Sequence[TokenizedPair]) -> list[list[TokenizedPair]]:
        return batch.split_by_budget(pairs, self._budget, self.packing)

    def _shared(self, pairs: Sequence[TokenizedPair]) -> list[list[TokenizedPair]]:
        """The micro-steps of this process's share of the pairs."""
        return self._split(share_of(self.group, pairs))

    def _fillers(self, pairs: Sequence[TokenizedPair], parts: int) -> list[list[TokenizedPair]]:
        """Micro-steps that count for nothing, so that a sharded model's passes are as many on all.

        `parts` are this process's own ones of these pairs.
        """
        if not (pairs and self.group.size > 1 and is_sharded(self.model)):
            return []
        shortest = min(pairs, key=batch.packed_length)
        return [[shortest]] * (self.group.most(parts) - parts)

    def _agreed(self, make: Callable[[], T]) -> T:
        """As `Group.agreed`; a sharded model's processes don't meet where one fails in a pass."""
        return make() if is_sharded(self.model) else self.group.agreed(make)

    def by_first(self, make: Callable[[], T]) -> T:
        """What the first process makes of the model; of a sharded one all make it, alike."""
        return make() if is_sharded(self.model) else self.group.from_first(make)

    def _in_parts(
        self,
        pairs: Sequence[TokenizedPair],
        run: Callable[[list[TokenizedPair]], T],
        read: Callable[[TokenizedPair], TokenizedPair] = lambda pair: pair,
    ) -> Iterator[tuple[list[TokenizedPair], T]]:
        """This process's micro-steps of the pairs, with what `run` makes of each.

        They are cut again where memory runs out. `read` says what is read of a pair.
        """
        parts = self._split([read(pair) for pair in share_of(self.group, pairs)])
        fillers = self._fillers([read(pair) for pair in pairs], len(parts))
        while parts:
            part, *parts = parts
            try:
                with self._engaged(part):
                    result = run(part)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                failure = str(error)
            else:
                yield part, result
                continue
            # Outside the handler: its traceback holds the failed pass's tensors.
            self._make_room(part, failure)
            parts = self._split([pair for rest in (part, *parts) for pair in rest])
        for part in fillers:
            with self._engaged(part):
                run(part)

    def _retried(self, run: Callable[[], T]) -> T:
        """`run`, from the start again, with the same random numbers, where memory runs out."""
        drawn = random_state()
        while True:
            try:
                return run()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                failure = str(error)
            clear_gradients(self.model)
            self._make_room(self._running, failure)
            set_random_state(drawn)

    def _make_room(self, failed: Sequence[TokenizedPair], failure: str) -> None:
        """Halve the micro-step that failed, or with a single pair turn checkpointing on.

        Raises:
            torch.OutOfMemoryError: neither is possible.
        """
        gc.collect()
        clear_device_cache()
        tokens = batch.micro_step_tokens(failed, self.packing)
        if is_sharded(self.model):  # the others wait for its share of a layer's weights
            raise torch.OutOfMemoryError(
                f"out of memory in a micro-step of {tokens} tokens (row {failed[0].row}), which a "
                "sharded model's processes can't begin again: a smaller max_tokens_per_microstep, "
                "gradient_checkpointing=True or a smaller max_length are the ways out. The "
                f"allocator said: {failure.splitlines()[0] if failure else 'nothing'}"
            )
        if len(failed) > 1:
            less = min(self._budget, tokens) // 2
            self.max_tokens = min(self.max_tokens, less)
            if not torch.is_grad_enabled():
                self.max_tokens_no_grad = less
            text = f"Out of memory: micro-steps of at most {less} tokens from here on"
            say(text, of_each=True)
        elif torch.is_grad_enabled() and self._may_checkpoint():
            self.enable_checkpointing()
            text = f"Out of memory with one pair of {tokens} tokens: checkpointing is on from here"
            say(text, of_each=True)
        else:
            raise torch.OutOfMemoryError(
                f"out of memory with one pair alone (row {failed[0].row}, {tokens} tokens); a "
                "smaller max_length, 4-bit weights or a smaller model are the ways out. The "
                f"allocator said: {failure.splitlines()[0] if failure else 'nothing'}"
            )

    def _may_checkpoint(self) -> bool:
        """Whether checkpointing is still to be had: off, not refused, known to the model."""
        return (
            not self.checkpointing
            and self.args.checkpointing_is_open
            and can_checkpoint(self.model)
        )

    def layers_again(self, pairs: Sequence[TokenizedPair]) -> int:
        """Layers of a micro-step that compute their activations again, where as many as needed."""
        assert self.as_needed is not None
        if not torch.is_grad_enabled():
            return 0
        return self.as_needed.layers_of(batch.micro_step_tokens(pairs, self.packing))

    @contextmanager
    def _engaged(self, pairs: Sequence[TokenizedPair]) -> Iterator[None]:
        """The model as it runs here: attention by segments when packed, layers in fewer passes."""
        again: AbstractContextManager[None] = nullcontext()
        if self.as_needed is not None:
            count = self.layers_again(pairs)
            again = checkpointed_layers(self.model, self.as_needed.layers, count)
        attention = packed_attention(self.model) if self.packing else nullcontext()
        with again, attention, fused_lora(self.model), replaced(self.fused_layers):
            yield
