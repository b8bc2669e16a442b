"""What a model is called: where it was loaded from, for people, and in a run's folder."""

from pathlib import Path, PureWindowsPath

from torch import nn

from rmipo_lite.adapters.base_model import causal_lm
from rmipo_lite.model.model_files import existing_folder

_LONGEST_NAME = 80  # bytes of a model's name in a folder's, which may have 255 in all


def name_of(model: str | nn.Module) -> str:
    """The name or folder that a model was loaded from; empty where it was made in memory."""
    return model if isinstance(model, str) else str(causal_lm(model).config.name_or_path or "")


def short_name(name: str) -> str:
    """A model's name for people: a hub name, also of its cache; of a path the last part."""
    try:
        folder = existing_folder(name)
    except FileNotFoundError:  # it was there when the model was loaded
        folder = Path(name)
    if folder is None:
        return name
    cached = folder.parent.parent.name  # models--OWNER--NAME/snapshots/COMMIT
    if folder.parent.name == "snapshots" and cached.startswith("models--"):
        return cached.removeprefix("models--").replace("--", "/", 1)
    return folder.name


def run_name(model: str | nn.Module) -> str:
    """A folder name for a run on this model: `rmipo-<model name>`."""
    last = PureWindowsPath(name_of(model)).name or "model"
    safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in last).strip(".")
    short = safe.encode()[:_LONGEST_NAME].decode(errors="ignore")
    return f"rmipo-{short or 'model'}"


def new_folder(name: str) -> Path:
    """A folder of this name that isn't there yet: `name`, `name-2`, ..."""
    folder, count = Path(name), 1
    while folder.exists():
        count += 1
        folder = Path(f"{name}-{count}")
    return folder
