"""`Group`: this process among those that train together, and what they say to each other.

Every process holds all pairs and draws the same step; `share` says who computes which of its pairs.
Nothing is said while a pass runs: a process may cut its share as it likes, run out of memory and
start again. They meet when a step is computed, and every decision that changes what comes next is
taken from numbers that are the same everywhere. So no process waits for one that never comes.

Of one process every meeting is nothing, and costs nothing.
"""

from __future__ import annotations

import heapq
import os
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rmipo_lite.output.console import is_launched
from rmipo_lite.parallel.sharded import is_part

T = TypeVar("T")


class OtherProcessError(RuntimeError):
    """Another process could not go on; its own message says why."""


@dataclass(frozen=True)
class Group:
    """The processes of a run.

    Attributes:
        rank: this one's number, the first's is 0.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @staticmethod
    def current() -> Group:
        """As a launcher began them (torchrun, accelerate launch); one where none did."""
        if dist.is_available() and dist.is_initialized():
            return Group(dist.get_rank(), dist.get_world_size())
        return Group()

    @property
    def is_first(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    @property
    def rank_here(self) -> int:
        """This one's number among those of this machine."""
        return int(os.environ.get("LOCAL_RANK", self.rank))

    @property
    def on_this_machine(self) -> int:
        """How many of them share this machine's memory."""
        return min(self.size, int(os.environ.get("LOCAL_WORLD_SIZE", self.size)))

    @property
    def _device(self) -> torch.device:
        # NCCL carries what lies on a card, and nothing else.
        on_card = "nccl" in str(dist.get_backend())
        return torch.device("cuda", torch.cuda.current_device()) if on_card else torch.device("cpu")

    def share(self, costs: Sequence[int]) -> list[int]:
        """Places that this process computes, in order: the costliest first, to who has least."""
        if self.size == 1:
            return list(range(len(costs)))
        loads = [(0, rank) for rank in range(self.size)]
        mine = []
        for place in sorted(range(len(costs)), key=lambda place: (-costs[place], place)):
            load, rank = heapq.heappop(loads)
            if rank == self.rank:
                mine.append(place)
            heapq.heappush(loads, (load + costs[place], rank))
        return sorted(mine)

    def add(self, numbers: Tensor) -> Tensor:
        """The sum over all processes, element by element, where `numbers` lies."""
        if self.size == 1:
            return numbers
        there = numbers.to(self._device)
        dist.all_reduce(there)
        return there.to(numbers.device)

    def any(self, flag: bool) -> bool:
        """Whether it holds of one of them."""
        return self.any_of([flag])[0]

    def any_of(self, flags: Sequence[bool]) -> list[bool]:
        """The same of several at once."""
        return [count > 0 for count in self.add(torch.tensor([*map(float, flags)])).tolist()]

    def least(self, number: int) -> int:
        """The smallest of their numbers."""
        return min(self.gather(number))

    def most(self, number: int) -> int:
        """The largest of their numbers."""
        return max(self.gather(number))

    def gather(self, value: T) -> list[T]:
        """Everybody's value, by rank, on every process."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def merged(self, own: Mapping[Any, T]) -> dict[Any, T]:
        """The entries of all."""
        return {key: value for part in self.gather(dict(own)) for key, value in part.items()}

    def agreed(self, make: Callable[[], T]) -> T:
        """What this process makes of its share; where one fails, all raise.

        Raises:
            OtherProcessError: it was another that failed.
        """
        if self.size == 1:
            return make()
        made, error = tried(make)
        failed = [rank for rank, has in enumerate(self.gather(error is not None)) if has]
        if error is not None:
            raise error
        if failed:
            raise OtherProcessError(f"process {failed[0]} could not go on; its message says why")
        return made

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first process makes, on every process; its error is raised everywhere."""
        if self.size == 1:
            return make()
        box: list[Any] = [None, None]
        if self.is_first:
            made, error = tried(make)
            box = [made, carried(error)]
        dist.broadcast_object_list(box, src=0)
        if box[1] is not None:
            raise box[1]
        return box[0]

    def add_gradients(self, model: nn.Module) -> None:
        """Every gradient the sum over all processes; None where nobody has one.

        Those of weights that are shared out were added up in the backward pass.
        """
        if self.size == 1:
            return
        trained = [p for p in model.parameters() if p.requires_grad and not is_part(p)]
        counts = self.add(torch.tensor([float(p.grad is not None) for p in trained])).tolist()
        by_kind: dict[Any, list[nn.Parameter]] = {}
        for parameter, count in zip(trained, counts, strict=True):
            if not count:  # it stays None: AdamW would decay the weight of a gradient of 0
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            by_kind.setdefault((parameter.grad.dtype, parameter.device), []).append(parameter)
        for parameters in by_kind.values():
            grads = [p.grad for p in parameters if p.grad is not None]
            flat = self.add(torch.cat([grad.reshape(-1) for grad in grads]))
            for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
                grad.copy_(part.view_as(grad))

    @torch.no_grad()
    def spread(self, weights: Iterable[Tensor]) -> None:
        """Make every weight the first process's."""
        for weight in weights if self.size > 1 else ():
            there = weight.to(self._device)
            dist.broadcast(there, src=0)
            weight.copy_(there)


def refuse_several(what: str) -> None:
    """Raise ValueError where a launcher began several processes for what one does alone."""
    launched = int(os.environ.get("WORLD_SIZE") or 1) if is_launched() else 1
    size = max(Group.current().size, launched)
    if size > 1:
        raise ValueError(
            f"{what} runs in one process, and this is one of {size}: start it without a launcher "
            "(it is training that is shared: train, RMiPOTrainer)"
        )


def tried(make: Callable[[], T]) -> tuple[Any, Exception | None]:
    """(what was made, the error instead)."""
    try:
        return make(), None
    except Exception as error:
        return None, error


def carried(error: Exception | None) -> Exception | None:
    """An error that can be sent: itself, or one with its words; none of none."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # its own making is the trouble
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
