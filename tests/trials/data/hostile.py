"""Check 35: files and folders made to do harm. Cases on data: `hostile_data`, `hostile_shown`."""

from __future__ import annotations

import builtins
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from rmipo_lite.adapters import attach
from rmipo_lite.checkpoints.sealed_folder import seal
from rmipo_lite.config import RMiPOConfig
from rmipo_lite.model import loading, names
from tests.kit import tiny_model, tiny_trainer, word_tokenizer
from tests.trials.data import hostile_data, hostile_shown
from tests.trials.data.hostile_data import Bench, expect_refused
from tests.trials.scorecard import Check, Trials, expect

_POISON = (
    "pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt",
    "scaler.pt", "rng_state.pth", "rng_state_0.pth",
)  # fmt: skip
_STEPS = 2


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def hostile_files(trials: Trials) -> None:
    """Pickles, code, names that leave the folder, templates, bombs, markup: nothing comes of it."""
    cases = list(CASES.items())
    saved = _saved(trials.folder / "saved")
    for trial in trials:
        with trial:
            name, case = cases[trial.index]
            trial.tried = name
            bench = Bench(trial.folder / "here", saved, trial.folder / "marker")
            bench.folder.mkdir()
            with mock.patch.object(builtins, "input", side_effect=EOFError) as question:
                case(bench)
            expect(not question.called, "somebody was asked on standard input")
            left = sorted(path.name for path in trial.folder.iterdir())
            expect(not bench.marker.exists(), "code was run: the marker is there")
            expect(left == ["here"], f"written outside the folder: {left}")


def _saved(folder: Path) -> Path:
    """A model with its tokenizer, an adapter on it, and a checkpoint of a run."""
    tiny_model().save_pretrained(folder / "base")
    word_tokenizer().save_pretrained(folder / "base")
    base = loading.load_model(str(folder / "base"), _args(folder))
    adapted: Any = attach.attach_adapter(base, "auto")
    adapted.save_pretrained(folder / "adapter")
    trainer = tiny_trainer(
        folder / "run", save_strategy="steps", save_steps=1, max_steps=_STEPS - 1
    )
    trainer.train()
    return folder


def _args(folder: Path) -> RMiPOConfig:
    return RMiPOConfig(str(folder / "run"), use_cpu=True)


# ---- pickles --------------------------------------------------------------------------------


def _copy(bench: Bench, what: str) -> Path:
    return Path(shutil.copytree(bench.saved / what, bench.folder / what))


def _poison(bench: Bench, folder: Path, name: str, *, zipped: bool = True) -> None:
    """A file that makes the marker when anything unpickles it."""
    bomb = Bomb(bench.marker)
    if zipped:
        torch.save(bomb, folder / name)
    else:
        (folder / name).write_bytes(pickle.dumps(bomb))


def _load(bench: Bench, folder: Path | str) -> Any:
    return loading.load_model(str(folder), _args(bench.folder))


def _bare_pickle(bench: Bench) -> None:
    """A model whose weights are a pickle without an archive around it."""
    folder = _copy(bench, "base")
    for file in folder.glob("*.safetensors"):
        file.unlink()
    _poison(bench, folder, "x.pt", zipped=False)
    expect_refused(lambda: _load(bench, folder), "x.pt", "pickle", "safetensors")


def _pickles_beside(what: str) -> Callable[[Bench], None]:
    """Safe weights with poison beside them: loaded, and the poison left alone."""

    def case(bench: Bench) -> None:
        folder = _copy(bench, what)
        for number, name in enumerate(_POISON):
            _poison(bench, folder, name, zipped=number % 2 == 0)
        ids = torch.arange(3, 9)[None]
        with torch.no_grad():
            models: list[Any] = [_load(bench, place) for place in (folder, bench.saved / what)]
            found, wanted = (model.eval()(ids).logits for model in models)
        expect(torch.equal(found, wanted), "other weights than the safe ones were loaded")

    return case


def _checkpoint(bench: Bench) -> Path:
    _copy(bench, "run")
    return bench.folder / "run" / f"checkpoint-{_STEPS - 1}"


def _stock_checkpoint(bench: Bench) -> None:
    """What transformers' own Trainer would have unpickled on resume."""
    folder = _checkpoint(bench)
    (folder / "manifest.json").unlink()
    for name in _POISON:
        _poison(bench, folder, name)
    trainer = tiny_trainer(bench.folder / "run", max_steps=_STEPS)
    expect_refused(
        lambda: trainer.train(resume_from_checkpoint=str(folder)), "manifest.json", "is missing"
    )


def _sealed_checkpoint(bench: Bench) -> None:
    """Poison under a manifest that fits: resumed, and the poison left alone."""
    folder = _checkpoint(bench)
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in _POISON:
        _poison(bench, folder, name)
    seal(folder, step=manifest["step"], run_id=manifest["run_id"], resumable=True)
    trainer = tiny_trainer(bench.folder / "run", max_steps=_STEPS)
    trainer.train(resume_from_checkpoint=str(folder))
    expect(trainer.state.global_step == _STEPS, "it did not resume")


# ---- code and names -------------------------------------------------------------------------


def _edit(folder: Path, file: str, **changes: Any) -> None:
    path = folder / file
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(content | changes))


def _own_code(bench: Bench, folder: Path) -> None:
    line = f"open({str(bench.marker)!r}, 'w')\n"
    for name in ("own", "custom_generate/generate"):
        (folder / name).with_suffix(".py").parent.mkdir(exist_ok=True)
        (folder / name).with_suffix(".py").write_text(line)


def _model_code(bench: Bench) -> None:
    folder = _copy(bench, "base")
    _own_code(bench, folder)
    maps = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M", "AutoTokenizer": "own.T"}
    _edit(folder, "config.json", model_type="own", auto_map=maps)
    expect_refused(lambda: _load(bench, folder), "code of its own", "pass the object")


def _tokenizer_code(bench: Bench) -> None:
    folder = _copy(bench, "base")
    _own_code(bench, folder)
    maps = {"AutoTokenizer": [None, "own.T"]}
    _edit(folder, "tokenizer_config.json", tokenizer_class="T", auto_map=maps)
    expect_refused(
        lambda: loading.load_tokenizer(str(folder)), "code of its own", "pass the object"
    )


def _code_of_a_known_model(bench: Bench) -> None:
    """A known model with code beside it: the library's own class, and nothing of the folder."""
    folder = _copy(bench, "base")
    _own_code(bench, folder)
    maps = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}
    _edit(folder, "config.json", auto_map=maps)
    model = _load(bench, folder)
    expect(type(model).__module__.startswith("transformers.models."), f"{type(model)} was loaded")
    model.generate(torch.arange(3, 6)[None], max_new_tokens=1)


def _adapter_on_a_pickle(bench: Bench) -> None:
    """The base that an adapter names is looked at as any folder is."""
    base, folder = _copy(bench, "base"), _copy(bench, "adapter")
    (base / "model.safetensors").unlink()
    _poison(bench, base, "pytorch_model.bin")
    outside = f"{folder}/../base"
    _edit(folder, "adapter_config.json", base_model_name_or_path=outside)
    expect_refused(lambda: _load(bench, folder), "pytorch_model.bin", "pickle")


def _adapter_with_modules(bench: Bench) -> None:
    """peft imports the module that an adapter names, and the library that it was made with."""
    folder = _copy(bench, "adapter")
    _own_code(bench, folder)
    mapping = {"base_model_class": "X", "parent_library": "own"}
    with mock.patch("sys.path", [str(folder)]):
        _edit(folder, "adapter_config.json", auto_mapping=mapping)
        _load(bench, folder)
        _edit(folder, "adapter_config.json", megatron_config={"a": 1}, megatron_core="own")
        expect_refused(lambda: _load(bench, folder), "adapter_config.json", "Megatron")


_NAMES = (
    "../../x", "..", ".", "/etc/passwd", "/", "", "a/../..", "x\x00y", "x" * 300, "\u00fc" * 300,
    "\U00020000" * 300, "CON", "nul.txt", ".hidden", "...", "-rf", "a b\nc", "~", "~root", "C:\\x",
    "x\u202ey", "\ud800", "\x1b[31m", "$(touch x)", "*",
)  # fmt: skip


def _output_names(bench: Bench) -> None:
    """A run is named after its model, whatever that calls itself, and stays where it is made."""
    reserved = {"CON", "PRN", "AUX", "NUL", "COM1", "LPT1"}
    for name in _NAMES:
        model = tiny_model()
        model.config._name_or_path = name
        for given in (name, model):
            run = names.run_name(given)
            place = (bench.folder / run).resolve()
            expect(place.parent == bench.folder.resolve(), f"{name!r} leaves the folder: {run!r}")
            expect(run.partition(".")[0].upper() not in reserved, f"{name!r} is reserved: {run!r}")
            expect(run.isprintable() and not run.startswith((".", "-")), f"{name!r}: {run!r}")
            place.mkdir(exist_ok=True)
            (place / "adapter_model.safetensors").touch()


CASES: dict[str, Callable[[Bench], None]] = {
    "a model whose weights are a bare pickle": _bare_pickle,
    "pickles beside a model": _pickles_beside("base"),
    "pickles beside an adapter": _pickles_beside("adapter"),
    "a checkpoint of pickles": _stock_checkpoint,
    "pickles in a sealed checkpoint": _sealed_checkpoint,
    "a model with code": _model_code,
    "a tokenizer with code": _tokenizer_code,
    "a known model with code beside it": _code_of_a_known_model,
    "an adapter whose base is a pickle": _adapter_on_a_pickle,
    "an adapter that names modules": _adapter_with_modules,
    "names of runs": _output_names,
    **hostile_data.CASES,
    **hostile_shown.CASES,
}
CHECKS = [
    Check(35, "hostile files: no code run, nothing outside, limits hold", len(CASES),
          hostile_files, least=len(CASES)),
]  # fmt: skip
