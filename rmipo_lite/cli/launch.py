"""`rmipo-lite train --num_processes N` or `--accelerate_config NAME`: the same command on several.

It is accelerate's launcher that begins them, with a file of accelerate's: one of two that come with
the package (`accelerate_configs/`), or any other that says something this package can do.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from rmipo_lite.output.console import say

# Seconds that torchrun gives its processes after Ctrl-C to end their step and to save; its own 30
# are less than a step of a large model takes.
_STOP_S = "600"
_SHIPPED = Path(__file__).parent / "accelerate_configs"
_TYPES = ("MULTI_GPU", "MULTI_CPU", "MULTI_XPU", "FSDP", "NO")

# By which a launcher tells a process of the others.
_OF_LAUNCHERS = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR",
    "MASTER_PORT",
)  # fmt: skip


def leave_the_others() -> None:
    """Be a process of one's own: what it does is no work for several, which have left."""
    for name in _OF_LAUNCHERS:
        os.environ.pop(name, None)


def config_file(name: str) -> tuple[Path, dict[str, Any]]:
    """accelerate's file of this name or path, and what it says.

    Raises:
        ValueError: there is none, it can't be read, or it asks for what isn't done here.
    """
    shipped = sorted(path.stem for path in _SHIPPED.glob("*.yaml"))
    path = _SHIPPED / f"{name}.yaml" if name in shipped else Path(name)
    if not path.is_file():
        raise ValueError(
            f"accelerate_config: there is no file {name}; wanted a path or one of "
            f"{', '.join(shipped)}"
        )
    try:
        said = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"accelerate_config: {name} can't be read: {error}") from error
    if not isinstance(said, dict) or "distributed_type" not in said:
        raise ValueError(
            f"accelerate_config: {name} is no file of accelerate's: it says no distributed_type"
        )
    kind = str(said["distributed_type"])
    version = (said.get("fsdp_config") or {}).get("fsdp_version", 1)
    if kind not in _TYPES or (kind == "FSDP" and int(version) != 2):
        what = f"FSDP version {version}" if kind == "FSDP" else kind
        raise ValueError(
            f"accelerate_config: {name} asks for {what}, which is not supported. Use fsdp2 for a "
            "model that doesn't fit one card, multi_gpu for one that does"
        )
    return path, said


def launch(words: Sequence[str], processes: int | None, config: str) -> int | None:
    """Run the command on several processes; its exit code, or None where this one is enough.

    Args:
        words: the command line behind `rmipo-lite`.
        processes: how many; None: as many as the file says, or as there are cards.
        config: name or path of accelerate's file.

    Raises:
        ValueError: as `config_file`.
    """
    import torch
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    path, said = config_file(config)
    own = said.get("num_processes") if path.parent != _SHIPPED else None
    processes = int(processes or own or torch.accelerator.device_count() or 1)
    machines = int(said.get("num_machines") or 1)
    if processes == 1:
        say("One process: nothing is shared")
        return None
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", _STOP_S)
    here = max(1, processes // machines)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // here)))
    flags = ["--config_file", str(path), "--num_processes", str(processes)]
    if machines == 1:
        flags += ["--main_process_port", "0"]
    args = launch_command_parser().parse_args([*flags, "-m", "rmipo_lite.cli.main", *words])
    args.standalone = machines == 1  # on a port that torchrun finds: other runs may be at work
    try:
        launch_command(args)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return int(failure.exitcode) if failure.exitcode > 0 else 1
    except SignalException:
        say("Interrupted; `--resume` goes on from the last checkpoint")
        return 130
    return 0
