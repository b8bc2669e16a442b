"""Scorecard check 26: adapters saved, loaded in a fresh process, merged, unmerged.

    python .ci/adapters.py            # the trials
    python .ci/adapters.py --write    # at a release: store an adapter of this version

Models of four architectures, with tied and with untied embeddings, are trained for a few steps and
saved. A new process loads each adapter: its logits must be those of the trained model bit for bit,
those of the merged model within 1e-5 of their size, and unmerging must bring them back. LoRA on
embeddings that are tied to the head is refused, or merges right; an adapter that lacks a weight or
has one of another shape is refused by its name. What earlier versions wrote, kept in
tests/references/adapters with the logits it gave, must still load and still give them.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from tests.trials.scorecard import Lost, expect
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import rmipo_lite
from rmipo_lite import RMiPOConfig, TrainResult
from rmipo_lite.checkpoints.weights import ADAPTER_FILE
from rmipo_lite.model.loading import load_model
from tests.kit import VOCAB, tiny_model, word_rows, word_tokenizer

STORE = Path(__file__).resolve().parent.parent / "tests" / "references" / "adapters"
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


def in_fresh_process(adapter: Path, merged: Path) -> dict[str, Tensor]:
    """The logits that a new interpreter gets from the two folders."""
    answer = adapter.parent / "answer.safetensors"
    command = [sys.executable, __file__, "--load", str(adapter), str(merged), str(answer)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    expect(done.returncode == 0, f"the fresh process failed: {done.stderr.strip()[-500:]}")
    return load_file(answer)


def load_and_merge(adapter: Path, merged: Path, answer: Path) -> None:
    """What the fresh process does."""
    model: Any = load_model(str(adapter), options(adapter.parent))
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


def saved_and_merged(folder: Path, architecture: str, tied: bool) -> list[tuple[str, str]]:
    """Two trials on one model: loaded bit for bit; merged and unmerged."""
    name = f"{architecture}, {'tied' if tied else 'untied'}"
    parts: dict[str, Any] = {}

    def loaded() -> str:
        base = save_base(folder, architecture, tie_word_embeddings=tied)
        result = trained(base, folder)
        layers = result.model.get_input_embeddings(), result.model.get_output_embeddings()
        expect((layers[0].weight is layers[1].weight) == tied, "tied weights are not as asked for")
        parts["want"] = logits(result.model)
        adapter = result.save(folder / "adapter")
        result.merge(folder / "merged")
        parts["got"] = got = in_fresh_process(adapter, folder / "merged")
        expect(torch.equal(got["loaded"], parts["want"]), "logits differ after loading")
        moved = distance(got["base"], got["loaded"])
        expect(moved > 100 * TOLERANCE, f"the adapter does nothing: {moved:.1e}")
        return f"moved {moved:.1e}, loaded bit for bit"

    def merged() -> str:
        got = parts["got"]
        far = {k: distance(got[k], parts["want"]) for k in ("merged", "merged_folder", "unmerged")}
        expect(max(far.values()) <= TOLERANCE, f"logits differ: {far}")
        return ", ".join(f"{kind} {value:.1e}" for kind, value in far.items())

    return [tried(f"{name}: saved, loaded", loaded), tried(f"{name}: merged, unmerged", merged)]


def adapted_end(folder: Path, architecture: str, target: str, tied: bool) -> str:
    """LoRA on the head or the embedding: refused where they are tied, or merged right."""
    base = save_base(folder, architecture, tie_word_embeddings=tied)
    try:
        result = trained(base, folder, LoraConfig(r=4, target_modules=[target]))
    except ValueError as error:
        expect(tied and target in str(error) and "tie" in str(error), f"another error: {error}")
        return "refused"
    want = logits(result.model)
    again = load_model(str(result.save(folder / "adapter")), options(folder))
    expect(torch.equal(logits(again), want), "logits differ after loading")
    far = distance(logits(result.merge()), want)
    expect(far <= TOLERANCE, f"trained, and merging changes the logits: {far:.1e}")
    return f"merged {far:.1e}"


def damaged(folder: Path, fault: str) -> str:
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
        return "refused by its name"
    expect(False, f"loaded without {name}")
    return ""


def stored(folder: Path, version: Path) -> str:
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
    return f"{far:.1e} from the stored logits"


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


def tried(name: str, trial: Callable[[], str]) -> tuple[str, str]:
    """One trial: its row is written; its name and what was lost, empty if nothing."""
    sink, lost = io.StringIO(), ""
    try:
        with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            outcome = trial()
    except Exception as error:
        lost = outcome = f"LOST: {error}"
        if not isinstance(error, Lost):
            where = traceback.extract_tb(error.__traceback__)[-1]
            lost = outcome = f"LOST: {type(error).__name__}: {error} ({where.name}, {where.lineno})"
    sys.stdout.write(f"{name:<48}{outcome}\n")
    sys.stdout.flush()
    return name, lost


def all_trials(scratch: Path) -> list[tuple[str, str]]:
    """Every trial, each in a folder of its own."""
    numbers = iter(range(1000))

    def new() -> Path:
        folder = scratch / str(next(numbers))
        folder.mkdir()
        return folder

    rows: list[tuple[str, str]] = []
    for architecture in ARCHITECTURES:
        for tied in (True, False):
            rows += saved_and_merged(new(), architecture, tied)
    for architecture, embedding in EMBEDDING.items():
        for target, tied in (("lm_head", True), (embedding, True), ("lm_head", False)):
            name = f"{architecture}: LoRA on {'tied' if tied else 'untied'} {target}"
            rows.append(tried(name, partial(adapted_end, new(), architecture, target, tied)))
    for fault in ("lacks a weight", "has a weight of another shape"):
        rows.append(tried(f"an adapter that {fault}", partial(damaged, new(), fault)))
    for version in sorted(path for path in STORE.iterdir() if path.is_dir()):
        rows.append(tried(f"of version {version.name}", partial(stored, new(), version)))
    return rows


def main(arguments: Sequence[str]) -> int:
    """Run what the arguments ask for; 1 if a trial is lost."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # bit for bit, in every process
    if arguments[:1] == ["--load"]:
        load_and_merge(*map(Path, arguments[1:]))
        return 0
    if arguments == ["--write"]:
        write()
        return 0
    with tempfile.TemporaryDirectory(prefix="rmipo-adapters-") as scratch:
        rows = all_trials(Path(scratch))
    lost = sum(bool(problem) for _, problem in rows)
    sys.stdout.write(f"{len(rows)} trials, {lost} lost\n")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
