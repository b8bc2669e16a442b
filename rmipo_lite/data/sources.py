"""Any container of preference rows -> a list of records, faulty records included.

One function, `read_records`, knows every kind of input; files are read by `files`. A record
that could not be read is a `Broken` in its place, so that row numbers stay.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rmipo_lite.data.files import SUFFIXES, read_file, transpose
from rmipo_lite.data.report import shortened
from rmipo_lite.output.console import say
from rmipo_lite.system.files import looks_like_path

_NO_ROWS = ("bytes", "bytearray", "memoryview")
_SPLIT_WORD = re.compile(
    r"(?:^|(?<=[-_. ]))(train|training|test|testing|valid|validation|val|dev|eval|evaluation)"
    r"(?=[-_. ]|$)",
    re.IGNORECASE,
)
_SPLITS, _STATE = "dataset_dict.json", "state.json"  # what a saved dataset's folder holds


def read_records(dataset: Any, split: str | None) -> tuple[str, list[Any]]:
    """(name of the source, its records in order); a record that is not a mapping is passed on.

    `split` None takes the one called train, or the only one.

    Raises:
        ValueError: not a dataset, an unreadable file, a missing split, columns of unequal length.
        FileNotFoundError: a path that does not exist.
    """
    if isinstance(dataset, str | Path):
        return _read_named(str(dataset), split)
    kind = type(dataset).__name__
    if kind in ("DatasetDict", "IterableDatasetDict"):
        return _read_split(dataset, split)
    if split is not None:
        raise ValueError(f"dataset: split {split!r} was asked for, and this {kind} has no splits")
    for method in ("to_dicts", "to_pylist"):  # polars, pyarrow
        if hasattr(dataset, method):
            return kind, getattr(dataset, method)()
    if hasattr(dataset, "to_dict") and hasattr(dataset, "columns"):  # pandas
        return f"pandas {kind}", dataset.to_dict("records")
    if isinstance(dataset, Mapping):
        return "dict of lists", transpose(dataset)
    if hasattr(dataset, "to_list") and hasattr(dataset, "column_names"):  # datasets.Dataset
        return kind, _read_dataset(dataset)
    if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and kind not in _NO_ROWS:
        return kind, [dataset[index] for index in range(len(dataset))]  # torch's Dataset too
    if kind in _NO_ROWS or not isinstance(dataset, Iterable):
        raise ValueError(
            "dataset: wanted a hub name, a path, a Dataset or DatasetDict, a list of dicts, a dict "
            f"of lists, a DataFrame or an iterable of dicts; got {kind}"
        )
    return kind, list(dataset)


def _read_dataset(dataset: Any) -> list[Any]:
    """Rows as plain dicts, whatever container a format would give them in."""
    form = getattr(dataset, "format", None)
    if form is None:  # a streamed one
        return list(dataset.with_format(None))
    if form["type"] == "custom":  # to_list() reads past a transform
        return list(dataset)
    shown = dataset.column_names if form["output_all_columns"] else form["columns"]
    return dataset.select_columns(shown).to_list()


def _read_named(name: str, split: str | None) -> tuple[str, list[Any]]:
    path = _existing(name)
    if path is not None and path.is_dir():
        return _named(name, _read_folder(path, split))
    if path is not None:
        if split is not None:
            raise ValueError(f"dataset: split {split!r} was asked for, and {name} is one file")
        return name, read_file(path)
    looks_local = Path(name).suffix in (*SUFFIXES, ".gz") or looks_like_path(name)
    if looks_local or not name.isprintable() or not name:
        raise FileNotFoundError(
            f"dataset: there is no file or folder {name[:200]!r} in {Path.cwd()}; wanted a path, "
            "a hub name, or the rows themselves as a list of dicts"
        )
    return _named(name, _read_hub(name, split))


def _named(name: str, read: tuple[str, list[Any]]) -> tuple[str, list[Any]]:
    """The source under its name, with the split that was taken."""
    taken = re.search(r"\[[^\]]*\]$", read[0])
    return name + (taken[0] if taken else ""), read[1]


def _existing(name: str) -> Path | None:
    """The file or folder of this name; None where there is none, or can't be (a NUL, too long)."""
    try:
        path = Path(name).expanduser()
        return path if path.is_dir() or path.is_file() else None
    except (OSError, ValueError, RuntimeError):
        return None


def _read_hub(name: str, split: str | None) -> tuple[str, list[Any]]:
    import datasets

    try:
        loaded = datasets.load_dataset(name)
    except Exception as error:  # the hub client raises many kinds; all mean "could not be had"
        raise ValueError(
            f"dataset: {name!r} is neither a file or folder here nor a dataset that could be had "
            f"from the hub ({type(error).__name__}: {str(error)[:300]})"
        ) from error
    return _read_split(loaded, split)


def _read_split(dataset: Any, split: str | None) -> tuple[str, list[Any]]:
    if not hasattr(dataset, "keys"):
        return read_records(dataset, split)
    taken = _choose_split(list(dataset.keys()), split)
    source, records = read_records(dataset[taken], None)
    return f"{source}[{taken}]", records


def _choose_split(names: list[str], wanted: str | None) -> str:
    """The split that was asked for, else "train", else the only one.

    Raises:
        ValueError: there is none such; the names, and the one that likely holds preferences.
    """
    if wanted in names:
        return wanted
    if not names:
        raise ValueError("dataset: it has no splits at all")
    if wanted is None and ("train" in names or len(names) == 1):
        return "train" if "train" in names else names[0]
    likely = sorted(names, key=lambda n: ("pref" not in n and "dpo" not in n, "train" not in n))
    asked = " called train" if wanted is None else f" {wanted!r}"
    raise ValueError(
        f"dataset: there is no split{asked} among {names}; pass one, such as split={likely[0]!r}"
    )


def _read_folder(path: Path, split: str | None) -> tuple[str, list[Any]]:
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
        return _read_split(loaded, split)
    splits = _splits_of_folder(path)
    if not splits:
        raise ValueError(
            f"dataset: the folder {path} holds no saved dataset and no file that ends in "
            f"{', '.join(SUFFIXES)} (also .gz)"
        )
    taken = _choose_split(list(splits), split)
    source = f"{path}[{taken}]" if taken else str(path)
    return source, [record for file in splits[taken] for record in read_file(file)]


def _splits_of_folder(path: Path) -> dict[str, list[Path]]:
    """Files by split: the folder's own, or those of its folders named after splits.

    Where it has neither, those of its folder data, as hubs lay it out.
    """
    for place in (path, path / "data"):
        if files := _files_of(place):
            return _splits_of_files(files)
        splits: dict[str, list[Path]] = {}
        for folder in sorted(place.iterdir()) if place.is_dir() else []:
            if (name := _split_of(folder.name)) and (files := _files_of(folder)):
                splits.setdefault(name, []).extend(files)
        if splits:
            return splits
    return {}


def _files_of(place: Path) -> list[Path]:
    if not place.is_dir():
        return []
    endings = (*SUFFIXES, *(suffix + ".gz" for suffix in SUFFIXES))
    named = [file for file in place.iterdir() if file.name.lower().endswith(endings)]
    return sorted(file for file in named if not file.name.startswith("."))  # `._x` of a Mac


def _splits_of_files(files: list[Path]) -> dict[str, list[Path]]:
    """Files by split, as hubs name them: train.jsonl, train_prefs-00000-of-00002.parquet.

    Files without a split in their names are the train split where there is no other; without any
    split they are all one, without a name.
    """
    splits: dict[str, list[Path]] = {}
    for file in files:
        stem = re.sub(r"\.gz$", "", file.name, flags=re.IGNORECASE).rpartition(".")[0]
        splits.setdefault(_split_of(stem), []).append(file)
    if "" not in splits or len(splits) == 1:
        return splits
    others = splits.pop("")
    if any(name.lower().startswith("train") for name in splits):
        names = shortened(", ".join(file.name for file in others))
        say(f"Not read, as there is a train split and these names hold no split: {names}")
    else:
        splits["train"] = others
    return splits


def _split_of(stem: str) -> str:
    """The split in the name of a file or folder, without its numbering; empty where none is.

    A name that begins with a split is the split's as a whole: train_prefs, test_sft.
    """
    stem = re.sub(r"[-_.]?\d+(-of-\d+(-[0-9a-f]{16})?)?$", "", stem)  # a hub's end in a hash
    found = _SPLIT_WORD.search(stem)
    if found is None:
        return ""
    is_longer = found.start() == 0 and found.end() < len(stem)
    return stem if is_longer else found[0].lower().removesuffix("ing")  # training, testing


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
