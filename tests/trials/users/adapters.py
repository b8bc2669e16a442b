"""Check 26: adapters saved, loaded in a new process, merged, unmerged.

    python -m tests.trials.users.adapters    # at a release: store an adapter of this version

Models of four architectures, with tied and with untied embeddings, are trained for a few steps and
saved. A new process loads each adapter: its logits must be those of the trained model bit for bit,
those of the merged model within 1e-5 of their size, and unmerging must bring them back. LoRA on
embeddings that are tied to the head is refused, or merges right; an adapter that lacks a weight or
has one of another shape is refused by its name. What earlier versions wrote, kept in
tests/references/adapters with the logits it gave, must still load and still give them.
"""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import rmipo_lite
from rmipo_lite import RMiPOConfig, TrainResult
from rmipo_lite.adapters.saved import ADAPTER_FILE
from rmipo_lite.model.loading import load_model
from tests.kit import VOCAB, tiny_model, word_rows, word_tokenizer
from tests.trials.runs.children import start
from tests.trials.scorecard import Check, Trials, expect

STORE = Path(__file__).resolve().parents[2] / "references" / "adapters"
ARCHITECTURES = ("llama", "qwen2", "gemma2", "gpt2")
EMBEDDING = {"llama": "embed_tokens", "gpt2": "wte"}
TOLERANCE = 1e-5  # of the largest logit
STORED_SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
}
CONFIG = "adapter_config.json"
Case = tuple[str, Callable[[Path], None]]  # what it is; a folder -> an error where it is lost


def adapters(trials: Trials) -> None:
    """The case of each index."""
    cases = all_cases()
    for trial in trials:
        with trial:
            trial.tried, case = cases[trial.index]
            case(trial.folder)


def all_cases() -> list[Case]:
    """Every architecture, every end that LoRA may lie on, every damage, every earlier version."""
    cases: list[Case] = []
    for architecture, tied in itertools.product(ARCHITECTURES, (True, False)):
        name = f"{architecture}, {'tied' if tied else 'untied'}"
        cases.append((f"{name}: saved, loaded", partial(loaded, architecture, tied)))
        cases.append((f"{name}: merged, unmerged", partial(merged, architecture, tied)))
    for architecture, embedding in EMBEDDING.items():
        for target, tied in (("lm_head", True), (embedding, True), ("lm_head", False)):
            name = f"{architecture}: LoRA on {'tied' if tied else 'untied'} {target}"
            cases.append((name, partial(adapted_end, architecture, target, tied)))
    for fault in ("lacks a weight", "has a weight of another shape"):
        cases.append((f"an adapter that {fault}", partial(damaged, fault)))
    for version in sorted(path for path in STORE.iterdir() if path.is_dir()):
        cases.append((f"of version {version.name}", partial(stored, version)))
    return cases


def logits(model: Any) -> Tensor:
    """(2, 12, V) logits of fixed ids."""
    ids = torch.arange(24).reshape(2, 12) * 7 % (VOCAB - 4) + 3
    with torch.no_grad():
        result: Tensor = model.eval()(input_ids=ids).logits
    return result.clone()


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference, of the largest logit."""
    return float((a - b).abs().max() / b.abs().max())


def options(folder: Path) -> RMiPOConfig:
    """What `load_model` needs to know."""
    return RMiPOConfig(str(folder / "run"), use_cpu=True)


def save_base(folder: Path, architecture: str, **sizes: Any) -> Path:
    """A random model as a folder."""
    tiny_model(architecture, **sizes).save_pretrained(folder / "base")
    return folder / "base"


def trained(base: Path, folder: Path, peft_config: LoraConfig | str = "auto") -> TrainResult:
    """A short run, which moves the logits by far more than any tolerance here."""
    return rmipo_lite.train(
        str(base),
        word_rows(12),
        tokenizer=word_tokenizer(),  # AutoTokenizer makes another of it in a folder of qwen2
        output_dir=folder / "run",
        peft_config=peft_config,
        max_steps=3,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        save_strategy="no",
        use_cpu=True,
    )


def in_new_process(adapter: Path, merged: Path) -> dict[str, Tensor]:
    """The logits that a new process gets from the two folders."""
    answer = adapter.parent / "answer.safetensors"
    folders = (str(adapter), str(merged), str(answer))
    child = start(load_and_merge, *folders, output=adapter.parent / "said")
    expect(child.wait() == 0, f"the new process failed: {child.text()[-500:]}")
    return load_file(answer)


def load_and_merge(adapter: str, merged: str, answer: str) -> None:
    """What the new process does."""
    model: Any = load_model(adapter, options(Path(adapter).parent))
    found = {"loaded": logits(model)}
    embedding = model.get_input_embeddings().weight.clone()
    model.merge_adapter(safe_merge=True)
    found["merged"] = logits(model)
    expect(torch.equal(embedding, model.get_input_embeddings().weight), "embeddings were changed")
    model.unmerge_adapter()
    found["unmerged"] = logits(model)
    with model.disable_adapter():
        found["base"] = logits(model)
    plain: Any = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    expect(not isinstance(plain, PeftModel), "the merged folder still has an adapter")
    found["merged_folder"] = logits(plain)
    save_file(found, answer)


def _round_trip(folder: Path, architecture: str, tied: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """The trained model's logits, and those that a new process gets from what it saved."""
    base = save_base(folder, architecture, tie_word_embeddings=tied)
    result = trained(base, folder)
    layers = result.model.get_input_embeddings(), result.model.get_output_embeddings()
    expect((layers[0].weight is layers[1].weight) == tied, "tied weights are not as asked for")
    want = logits(result.model)
    adapter = result.save(folder / "adapter")
    result.merge(folder / "merged")
    return want, in_new_process(adapter, folder / "merged")


def loaded(architecture: str, tied: bool, folder: Path) -> None:
    """Loaded bit for bit; and it is not for nothing."""
    want, got = _round_trip(folder, architecture, tied)
    expect(torch.equal(got["loaded"], want), "logits differ after loading")
    moved = distance(got["base"], got["loaded"])
    expect(moved > 100 * TOLERANCE, f"the adapter does nothing: {moved:.1e}")


def merged(architecture: str, tied: bool, folder: Path) -> None:
    """Merged, in memory and in a folder, and unmerged."""
    want, got = _round_trip(folder, architecture, tied)
    far = {kind: distance(got[kind], want) for kind in ("merged", "merged_folder", "unmerged")}
    expect(max(far.values()) <= TOLERANCE, f"logits differ: {far}")


def adapted_end(architecture: str, target: str, tied: bool, folder: Path) -> None:
    """LoRA on the head or the embedding: refused where they are tied, or merged right."""
    base = save_base(folder, architecture, tie_word_embeddings=tied)
    try:
        result = trained(base, folder, LoraConfig(r=4, target_modules=[target]))
    except ValueError as error:
        expect(tied and target in str(error) and "tie" in str(error), f"another error: {error}")
        return
    want = logits(result.model)
    again = load_model(str(result.save(folder / "adapter")), options(folder))
    expect(torch.equal(logits(again), want), "logits differ after loading")
    far = distance(logits(result.merge()), want)
    expect(far <= TOLERANCE, f"trained, and merging changes the logits: {far:.1e}")


def damaged(fault: str, folder: Path) -> None:
    """An adapter that lacks a weight, or has one of another shape, is refused by its name."""
    adapter = trained(save_base(folder, "llama"), folder).save(folder / "adapter")
    weights = load_file(adapter / ADAPTER_FILE)
    name = sorted(weights)[len(weights) // 2]
    weight = weights.pop(name)
    if "shape" in fault:
        weights[name] = weight[:, 1:].contiguous()
    save_file(weights, adapter / ADAPTER_FILE, metadata={"format": "pt"})
    try:
        load_model(str(adapter), options(folder))
    except ValueError as error:
        found = name.removesuffix(".weight") in str(error)
        expect(found, f"the error does not name {name}: {error}")
    else:
        expect(False, f"loaded without {name}")


def stored(version: Path, folder: Path) -> None:
    """An adapter of an earlier version gives the logits it gave."""
    copy = folder / "copy"
    shutil.copytree(version, copy)
    config = json.loads((copy / CONFIG).read_text())
    config["base_model_name_or_path"] = str(copy / config["base_model_name_or_path"])
    (copy / CONFIG).write_text(json.dumps(config))
    want = load_file(copy / "logits.safetensors")
    model: Any = load_model(str(copy), options(folder))
    far = distance(logits(model), want["adapter"])
    expect(far <= TOLERANCE, f"the stored logits are {far:.1e} away")
    with model.disable_adapter():
        far_base = distance(logits(model), want["base"])
    expect(far_base <= TOLERANCE, f"the base's stored logits are {far_base:.1e} away")


def write() -> None:
    """Store an adapter of this version, with its base and the logits of both."""
    place = STORE / rmipo_lite.__version__
    if place.exists():
        raise SystemExit(f"{place} is there already; what a version has written stays")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = save_base(folder, "llama", **STORED_SIZES)
        result = trained(base, folder, LoraConfig(r=2, target_modules="all-linear"))
        adapter = result.save(folder / "adapter")
        want = {"adapter": logits(result.model)}
        with result.adapter_off() as model:
            want["base"] = logits(model)
        for file in ("config.json", "model.safetensors"):
            (place / "base").mkdir(parents=True, exist_ok=True)
            shutil.copy(base / file, place / "base" / file)
        shutil.copy(adapter / ADAPTER_FILE, place / ADAPTER_FILE)
        config = json.loads((adapter / CONFIG).read_text())
        config["base_model_name_or_path"] = "base"
        (place / CONFIG).write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
        save_file(want, place / "logits.safetensors")


_ALL = len(all_cases())
CHECKS = [
    Check(
        26,
        "adapters: new process, merged, earlier releases'",
        _ALL,
        adapters,
        least=_ALL,
        is_long=True,
    )
]

if __name__ == "__main__":
    write()
