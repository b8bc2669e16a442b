"""Write and read a run's state (optimizer, scheduler, scaler, random numbers) without pickle.

`torch.load` can run code that a stranger put into a file, and a checkpoint is a file people pass
on. So a state is split: its tensors go to `<name>.safetensors`, its structure to `<name>.json`
where `{"__tensor__": "3"}` stands for tensor 3. JSON keeps every Python float exactly, and tuples,
integer keys, bytes and numpy arrays are marked, so that what is read equals what was written.
"""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

_MARKS = ("__tensor__", "__tuple__", "__items__", "__array__", "__bytes__")


def _encode(value: Any, tensors: dict[str, torch.Tensor], where: str) -> Any:
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        # clone: safetensors refuses two names for one memory, and optimizers share code books
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"__tensor__": name}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return {"__array__": value.tolist(), "dtype": value.dtype.str}
    if isinstance(value, bytes):
        return {"__bytes__": base64.b64encode(value).decode("ascii")}
    if isinstance(value, dict):
        if all(isinstance(k, str) and k not in _MARKS for k in value):
            return {k: _encode(v, tensors, f"{where}.{k}") for k, v in value.items()}
        return {
            "__items__": [
                [_encode(k, tensors, where), _encode(v, tensors, f"{where}[{k!r}]")]
                for k, v in value.items()
            ]
        }
    if isinstance(value, (list, tuple)):
        items = [_encode(v, tensors, f"{where}[{i}]") for i, v in enumerate(value)]
        return items if isinstance(value, list) else {"__tuple__": items}
    raise TypeError(
        f"{where} is a {type(value).__name__}; a checkpoint holds tensors, numbers, texts, lists, "
        "tuples, dicts, bytes and numpy arrays only, because anything else would need pickle"
    )


def _decode(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if "__tensor__" in value:
        return tensors[value["__tensor__"]]
    if "__tuple__" in value:
        return tuple(_decode(v, tensors) for v in value["__tuple__"])
    if "__items__" in value:
        return {_decode(k, tensors): _decode(v, tensors) for k, v in value["__items__"]}
    if "__array__" in value:
        return np.array(value["__array__"], dtype=np.dtype(value["dtype"]))
    if "__bytes__" in value:
        return base64.b64decode(value["__bytes__"])
    return {k: _decode(v, tensors) for k, v in value.items()}


def save_state(folder: Path, name: str, state: Any) -> None:
    """Write `state` as `folder/name.json` and, where it holds tensors, `folder/name.safetensors`.

    Raises TypeError naming the entry when something in it has no form without pickle.
    """
    tensors: dict[str, torch.Tensor] = {}
    structure = _encode(state, tensors, name)
    (folder / f"{name}.json").write_text(json.dumps(structure), encoding="utf-8")
    if tensors:
        save_file(tensors, folder / f"{name}.safetensors")


def load_state(folder: Path, name: str) -> Any:
    """Read what `save_state` wrote; tensors come back on the CPU.

    Raises FileNotFoundError when the state isn't there: a missing state is never a fresh one.
    """
    structure = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    tensor_file = folder / f"{name}.safetensors"
    # Copies: what is mapped keeps Windows from deleting the file for as long as it is used.
    mapped = load_file(tensor_file) if tensor_file.is_file() else {}
    tensors = {key: tensor.clone() for key, tensor in mapped.items()}
    return _decode(structure, tensors)
