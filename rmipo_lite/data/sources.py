"""Any container of preference rows -> a list of records, faulty records included.

One function, `read_records`, knows every kind of input; files are read by `files`. A record
that could not be read is a `Broken` in its place, so that row numbers stay.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rmipo_lite.data.files import SUFFIXES, read_file, transpose

_SPLITS, _STATE = "dataset_dict.json", "state.json"  # what a saved dataset's folder holds


def read_records(dataset: Any, split: str) -> tuple[str, list[Any]]:
    """(name of the source, its records in order); a record that is not a mapping is passed on.

    Raises:
        ValueError: not a dataset, an unreadable file, a missing split, columns of unequal length.
        FileNotFoundError: a path that does not exist.
    """
    if isinstance(dataset, str | Path):
        return _read_named(str(dataset), split)
    kind = type(dataset).__name__
    if hasattr(dataset, "to_dict") and hasattr(dataset, "columns"):  # pandas
        return f"pandas {kind}", dataset.to_dict("records")
    if kind in ("DatasetDict", "IterableDatasetDict"):
        return _read_split(dataset, split)
    if isinstance(dataset, Mapping):
        return "dict of lists", transpose(dataset)
    if hasattr(dataset, "to_list") and hasattr(dataset, "column_names"):  # datasets.Dataset
        return kind, dataset.to_list()
    if isinstance(dataset, bytes) or not isinstance(dataset, Iterable):
        raise ValueError(
            "dataset: wanted a hub name, a path, a Dataset or DatasetDict, a list of dicts, a dict "
            f"of lists, a DataFrame or an iterable of dicts; got {kind}"
        )
    return kind, list(dataset)


def _read_named(name: str, split: str) -> tuple[str, list[Any]]:
    path = _existing(name)
    if path is not None:
        return name, _read_folder(path, split) if path.is_dir() else read_file(path)
    looks_local = Path(name).suffix in (*SUFFIXES, ".gz") or name.startswith(("/", ".", "~"))
    if looks_local or name.count("/") > 1 or not name.isprintable() or not name:
        raise FileNotFoundError(
            f"dataset: there is no file or folder {name[:200]!r} in {Path.cwd()}; wanted a path, "
            "a hub name, or the rows themselves as a list of dicts"
        )
    return name, _read_hub(name, split)


def _existing(name: str) -> Path | None:
    """The file or folder of this name; None where there is none, or can't be (a NUL, too long)."""
    try:
        path = Path(name).expanduser()
        return path if path.is_dir() or path.is_file() else None
    except (OSError, ValueError, RuntimeError):
        return None


def _read_hub(name: str, split: str) -> list[Any]:
    import datasets

    try:
        loaded = datasets.load_dataset(name)
    except Exception as error:  # the hub client raises many kinds; all mean "could not be had"
        raise ValueError(
            f"dataset: {name!r} is neither a file or folder here nor a dataset that could be had "
            f"from the hub ({type(error).__name__}: {str(error)[:300]})"
        ) from error
    return _read_split(loaded, split)[1]


def _read_split(dataset: Any, split: str) -> tuple[str, list[Any]]:
    if not hasattr(dataset, "keys"):
        return read_records(dataset, split)
    names = list(dataset.keys())
    if split not in names:
        if len(names) != 1:
            raise ValueError(
                f"dataset: no split {split!r} among {names}; pass one, e.g. dataset[{names[0]!r}]"
                if names
                else "dataset: the DatasetDict is empty"
            )
        split = names[0]
    source, records = read_records(dataset[split], split)
    return f"{source}[{split}]", records


def _read_folder(path: Path, split: str) -> list[Any]:
    if any((path / name).is_file() for name in (_SPLITS, _STATE)):
        import datasets

        try:
            _refuse_names_outside(path)
            loaded = datasets.load_from_disk(str(path))
        except Exception as error:  # arrow and datasets raise many kinds
            raise ValueError(
                f"dataset: the folder {path} could not be read as a saved dataset "
                f"({type(error).__name__}: {str(error)[:300]})"
            ) from error
        return _read_split(loaded, split)[1]
    files = sorted(
        file for file in path.iterdir() if file.name.removesuffix(".gz").endswith(SUFFIXES)
    )
    files = [file for file in files if split in file.name] or files
    if not files:
        raise ValueError(
            f"dataset: the folder {path} holds no saved dataset and no file that ends in "
            f"{', '.join(SUFFIXES)} (also .gz)"
        )
    return [record for file in files for record in read_file(file)]


def _refuse_names_outside(path: Path) -> None:
    """The names in a saved dataset's own files are joined to its path, `..` and all."""
    names: list[str] = []
    if (path / _SPLITS).is_file():
        splits = json.loads((path / _SPLITS).read_bytes())["splits"]
        names += splits
        for name in splits:
            if name == Path(name).name and (path / name).is_dir():
                _refuse_names_outside(path / name)
    if (path / _STATE).is_file():
        state = json.loads((path / _STATE).read_bytes())
        names += [file["filename"] for file in state["_data_files"]]
    for name in names:
        if name != Path(name).name:
            raise ValueError(f"it names {name[:100]!r}, wanted a name inside the folder")
