"""Check 45: adapters of every kind, as others use them.

A model is trained with each kind of adapter, and then: its folder is loaded by plain peft; the run
is interrupted and resumed; it is merged and loaded by plain transformers; before and after are
compared; the saved adapter goes on, given as a frozen PeftModel and as a folder; and the same model
is trained again with a new adapter. Logits are equal to what they should be, or the adapter is
refused by name before the first step.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import rmipo_lite
from rmipo_lite import TrainResult
from tests.kit import tiny_model, word_rows, word_tokenizer
from tests.trials.scorecard import Check, Trials, expect
from tests.trials.users.adapters import distance, logits

_ATTENTION = ["q_proj", "v_proj"]
_TOLERANCE = 2e-5  # of the largest logit


def _lora(**options: Any) -> Callable[[], Any]:
    return lambda: LoraConfig(
        **{"r": 4, "target_modules": _ATTENTION, "task_type": "CAUSAL_LM", **options}
    )


def _of(name: str, **options: Any) -> Callable[[], Any]:
    wanted = {"target_modules": _ATTENTION, "task_type": "CAUSAL_LM", **options}
    return lambda: getattr(peft, f"{name}Config")(**wanted)


KINDS: dict[str, Callable[[], Any]] = {
    "LoRA": _lora(),
    "LoRA on every layer": _lora(target_modules="all-linear"),
    "DoRA": _lora(use_dora=True),
    "rsLoRA": _lora(use_rslora=True),
    "LoRA, ranks by pattern": _lora(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}),
    "LoRA on one layer": _lora(layers_to_transform=[1]),
    "LoRA and a norm": _lora(modules_to_save=["norm"]),
    "LoRA, head and embedding": _lora(modules_to_save=["lm_head", "embed_tokens"]),
    "LoRA and three tokens": _lora(trainable_token_indices=[5, 6, 7]),
    "LoRA on the head": _lora(target_modules=[*_ATTENTION, "lm_head"]),
    "LoRA on the embedding": _lora(target_modules=[*_ATTENTION, "embed_tokens"]),
    "LoRA with biases": _lora(lora_bias=True),
    "LoRA on a parameter": _lora(target_modules=[], target_parameters=["q_proj.weight"]),
    "LoRA, not nothing at first": _lora(init_lora_weights=False),
    "LoRA, orthogonal": _lora(init_lora_weights="orthogonal"),
    "PiSSA": _lora(init_lora_weights="pissa"),
    "PiSSA, fast": _lora(init_lora_weights="pissa_niter_4"),
    "PiSSA and a norm": _lora(init_lora_weights="pissa", modules_to_save=["norm"]),
    "OLoRA": _lora(init_lora_weights="olora", use_rslora=True),
    "PiSSA with DoRA": _lora(init_lora_weights="pissa", use_dora=True),
    "IA3": _of("IA3", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "LoHa": _of("LoHa", r=4),
    "LoKr": _of("LoKr", r=4),
    "OFT": _of("OFT", r=0, oft_block_size=4),
    "VeRA": _of("Vera", r=4),
    "BOFT": _of("BOFT", boft_block_size=4),
    "HRA": _of("HRA", r=4),
    "FourierFT": _of("FourierFT", n_frequency=20),
    "MiSS": _of("Miss", r=4),
    "norms": _of("LNTuning", target_modules=["norm", "input_layernorm"]),
    "prompt tuning": lambda: peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "prefix tuning": lambda: peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "AdaLoRA": _of("AdaLora", total_step=10),
}
REFUSED = {"prompt tuning", "prefix tuning", "AdaLoRA", "PiSSA with DoRA"}


def _base(folder: Path) -> Any:
    place = folder / "base"
    if not place.is_dir():
        tiny_model("llama", num_hidden_layers=2).save_pretrained(place)
    return AutoModelForCausalLM.from_pretrained(place)


def _train(model: Any, folder: Path, name: str, **options: Any) -> TrainResult:
    wanted = {"max_steps": 4, "learning_rate": 1e-2, "save_strategy": "no", **options}
    return rmipo_lite.train(
        model,
        word_rows(12),
        tokenizer=word_tokenizer(),
        output_dir=folder / name,
        per_device_train_batch_size=4,
        eval_completions=0,
        sample_prompts=0,
        use_cpu=True,
        **wanted,
    )


def _close(a: Any, b: Any, what: str) -> None:
    far = distance(logits(a), logits(b))
    expect(far <= _TOLERANCE, f"{what}: {far:.1e} of the largest logit away")


def _trained(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def reloaded(kind: Callable[[], Any], folder: Path) -> None:
    """The folder in plain peft gives the trained model, which has moved."""
    base = _base(folder)
    result = _train(_base(folder), folder, "run", peft_config=kind())
    again = PeftModel.from_pretrained(_base(folder), result.output_dir)
    _close(again, result.model, "loaded by peft")
    expect(distance(logits(result.model), logits(base)) > 1e-4, "training moved nothing")


def resumed(kind: Callable[[], Any], folder: Path) -> None:
    """Two steps and two more are the same as four."""
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = _train(_base(folder), folder, "run", peft_config=kind(), **saving)
    shutil.rmtree(whole.output_dir / "checkpoint-4")
    rest = _train(_base(folder), folder, "run", peft_config=kind(), resume=True, **saving)
    _close(rest.model, whole.model, "resumed")
    again = PeftModel.from_pretrained(_base(folder), rest.output_dir)
    _close(again, rest.model, "resumed, saved and loaded by peft")


def merged(kind: Callable[[], Any], folder: Path) -> None:
    """The merged folder in plain transformers, and the result as it was."""
    result = _train(_base(folder), folder, "run", peft_config=kind())
    before, trained = logits(result.model), _trained(result.model)
    try:
        result.merge(folder / "merged")
    except ValueError as error:
        expect("merge: " in str(error), f"another error: {error}")
        expect(not (folder / "merged").exists(), "half a folder is left")
    else:
        plain = AutoModelForCausalLM.from_pretrained(folder / "merged")
        _close(plain, result.model, "merged, loaded by transformers")
    expect(torch.equal(logits(result.model), before), "merging changed the trained model")
    expect(_trained(result.model) == trained, "merging froze the trained model")


def compared(kind: Callable[[], Any], folder: Path) -> None:
    """Without its adapter the model is the base; at step 0 it is what it was then."""
    result = _train(_base(folder), folder, "run", peft_config=kind())
    after = logits(result.model)
    with result.adapter_off() as off:
        _close(off, _base(folder), "without the adapter")
    with result.at_start() as early:
        start = _train(_base(folder), folder, "none", peft_config=kind(), learning_rate=0.0)
        _close(early, start.model, "at step 0")
    expect(torch.equal(logits(result.model), after), "looking changed the trained model")


def gone_on(kind: Callable[[], Any], folder: Path) -> None:
    """A saved adapter goes on: a frozen PeftModel as well as a folder, every weight of it."""
    saved = folder / "adapter"
    if getattr(kind(), "init_lora_weights", None) in ("pissa", "pissa_niter_4", "olora"):
        saved = _train(_base(folder), folder, "first", peft_config=kind()).output_dir
    else:
        get_peft_model(_base(folder), kind()).save_pretrained(saved)
    frozen = PeftModel.from_pretrained(_base(folder), saved)
    as_model = _train(frozen, folder, "model")
    trainable = PeftModel.from_pretrained(_base(folder), saved, is_trainable=True)
    wanted, found = _trained(trainable), _trained(as_model.model)
    expect(found == wanted, f"trained {len(found)} weights of {len(wanted)}")
    as_folder = _train(str(saved), folder, "folder")
    _close(as_folder.model, as_model.model, "as a folder and as a model")


def anew(kind: Callable[[], Any], folder: Path) -> None:
    """A second run with a new adapter begins at the base model, and "auto" goes on."""
    model = _base(folder)
    first = _train(model, folder, "first", peft_config=kind())
    on = _train(model, folder, "on", learning_rate=0.0)
    expect(on.model is first.model, "the adapter was not gone on with")
    fresh = _train(model, folder, "new", peft_config="new", learning_rate=0.0)
    _close(fresh.model, _base(folder), "a new adapter's start")


_WAYS: tuple[Callable[[Callable[[], Any], Path], None], ...] = (
    reloaded, resumed, merged, compared, gone_on, anew,
)  # fmt: skip
_CASES = list(itertools.product(KINDS, _WAYS))


def kinds(trials: Trials) -> None:
    """The kind and the way of each index."""
    for trial in trials:
        with trial:
            name, way = _CASES[trial.index]
            trial.tried = f"{name}: {way.__name__}"
            try:
                way(KINDS[name], trial.folder)
            except ValueError as error:
                expect(name in REFUSED, f"{error}")
                expect("peft_config" in str(error) or "model" in str(error), f"unclear: {error}")
            else:
                expect(name not in REFUSED, "trained, and should be refused")


CHECKS = [Check(45, "adapters of every kind, as others use them", len(_CASES), kinds, is_long=True)]
