"""`rmipo-lite train --num_processes N`: the same command on N processes of this machine."""

import os
from collections.abc import Sequence

from rmipo_lite.output.console import say

# Seconds that torchrun gives its processes after Ctrl-C to end their step and to save; its own 30
# are less than a step of a large model takes.
_STOP_S = "600"


# By which a launcher tells a process of the others.
_OF_LAUNCHERS = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR",
    "MASTER_PORT",
)  # fmt: skip


def leave_the_others() -> None:
    """Be a process of one's own: what it does is no work for several, which have left."""
    for name in _OF_LAUNCHERS:
        os.environ.pop(name, None)


def launch(words: Sequence[str], processes: int) -> int:
    """Run the command on so many processes; its exit code."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", _STOP_S)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    module = ("-m", "rmipo_lite.cli.main")
    try:
        main(["--standalone", "--nproc_per_node", str(processes), *module, *words])
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return int(failure.exitcode) if failure.exitcode > 0 else 1
    except SignalException:
        say("Interrupted; `--resume` goes on from the last checkpoint")
        return 130
    return 0
