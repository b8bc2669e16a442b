"""What a model's folder may hold, looked at before any of it is loaded.

Folders come from strangers. Weights are read as safetensors alone, since pickled ones can run code
while they load; code in the folder is never run, and nobody is asked whether it may; names inside
the folder's own files must stay inside it.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rmipo_lite.system.files import looks_like_path

ADAPTER_CONFIG = "adapter_config.json"
_WEIGHTS = {"model": "model.safetensors", "adapter": "adapter_model.safetensors"}
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_NO_WEIGHTS = ("training_args.bin", "optimizer.pt", "scheduler.pt")
_LONGEST_QUOTE = 200  # characters of a library's own words


def existing_folder(name: str) -> Path | None:
    """The folder of this name, None where it can only be a hub's.

    Raises:
        FileNotFoundError: it is a path, and there is no folder.
    """
    try:
        path = Path(name).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError, RuntimeError):  # a NUL, too long, no such user
        is_folder, is_file = False, True
    if is_folder:
        return path
    if is_file or looks_like_path(name) or not name.isprintable():
        raise FileNotFoundError(
            f"model: there is no folder {name[:_LONGEST_QUOTE]!r} (seen from {Path.cwd()}); wanted "
            "a model's folder or a hub name"
        )
    return None


def check_model_folder(folder: Path) -> None:
    """Refuse pickled weights and shards that lie elsewhere.

    Raises:
        ValueError: the folder's weights can't be loaded safely.
        FileNotFoundError: it is no model's folder.
    """
    if not (folder / "config.json").is_file():
        inside = [path.parent.name for path in sorted(folder.glob(f"*/{ADAPTER_CONFIG}"))]
        hint = f"; {', '.join(inside[:5])} inside it hold adapters" if inside else ""
        raise FileNotFoundError(
            f"model: {folder} has no config.json, so it is no model's folder{hint}"
        )
    index = folder / "model.safetensors.index.json"
    if index.is_file() and not (folder / _WEIGHTS["model"]).is_file():
        for shard in _shards(index):
            if shard != Path(shard).name or not shard.endswith(".safetensors"):
                raise ValueError(
                    f"model: {index} names {shard[:80]!r}, wanted *.safetensors files beside it"
                )
    elif not (folder / _WEIGHTS["model"]).is_file():
        _refuse_pickles(folder, "model")


def _shards(index: Path) -> set[str]:
    weight_map = _read_json("model", index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"model: {index} has no weight_map")
    return {str(shard) for shard in weight_map.values()}


def base_of_adapter(folder: Path) -> str:
    """The name of the model that an adapter's folder belongs to.

    Raises:
        ValueError: there is none, the weights are pickled, or the base is an adapter itself.
    """
    if not (folder / _WEIGHTS["adapter"]).is_file():
        _refuse_pickles(folder, "adapter")
    config = _read_json("adapter", folder / ADAPTER_CONFIG)
    if config.get("megatron_config") is not None:
        # peft would import the module that the file names.
        raise ValueError(
            f"adapter: {folder / ADAPTER_CONFIG} asks for Megatron's layers, which are "
            "not supported; remove megatron_config from it"
        )
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(
            f"adapter: {folder / ADAPTER_CONFIG} names no base model; load the base yourself and "
            f"pass PeftModel.from_pretrained(base, {str(folder)!r}, is_trainable=True)"
        )
    base_folder = existing_folder(base)
    if base_folder is not None and (base_folder / ADAPTER_CONFIG).is_file():
        raise ValueError(
            f"adapter: the base of {folder}, {base!r}, is an adapter itself; merge that one first "
            "(TrainResult.merge)"
        )
    return base


def _refuse_pickles(folder: Path, what: str) -> None:
    pickled = sorted(
        file.name
        for pattern in _PICKLED
        for file in folder.glob(pattern)
        if file.name not in _NO_WEIGHTS
    )
    if pickled:
        raise ValueError(
            f"{what}: {folder} holds its weights as a pickle alone ({pickled[0]}), which can run "
            "code while it loads; wanted safetensors. Convert it where you trust it: load it there "
            "and call save_pretrained"
        )
    raise FileNotFoundError(f"{what}: {folder} has no weights: wanted {_WEIGHTS[what]}")


def _read_json(what: str, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{what}: {path} is not readable JSON ({str(error)[:100]})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{what}: {path} holds no JSON object")
    return content


@contextlib.contextmanager
def named_errors(what: str, name: str, way_out: str) -> Iterator[None]:
    """Say what could not be loaded, and why, in place of a library's page.

    Raises:
        ValueError: whatever went wrong in the block, which is the error's cause.
    """
    try:
        yield
    except Exception as error:  # transformers, safetensors and torch raise many kinds
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{what}: {name!r} comes with code of its own, which is never run from here. Read "
                "that code, load it yourself with trust_remote_code=True and pass the object"
            ) from error
        words = " ".join(str(error).split())[:_LONGEST_QUOTE]
        raise ValueError(
            f"{what}: {name!r} could not be loaded ({type(error).__name__}: {words}). {way_out}"
        ) from error
