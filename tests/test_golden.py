"""Against the values recorded from the authors' own code (`gamma_scaled_by_beta=True`).

Everything is fed below `data.py`, with the recorded token ids, so that only the method is compared:
policy and prior pass, means, PMI, gamma, losses, gradients of every parameter, and whole runs
through `RMiPOTrainer`.
"""

from __future__ import annotations

import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from rmipo_lite.config import RMiPOConfig
from rmipo_lite.step import pair_values
from rmipo_lite.step.pair_step import PairStep
from rmipo_lite.step.pair_values import StepOutcome
from rmipo_lite.tokens.pair import TokenizedPair
from rmipo_lite.training.trainer import RMiPOTrainer
from tests.conftest import REFERENCES

VALUE = 2e-5  # absolute, fp32
GRADIENT = 1e-4  # relative

BATCHES = ["b0", "b1", "b2", "b3"]
VARIANTS = [
    "rmipo",
    "simpo",
    "hinge",
    "simper",
    "rmipo+label_smoothing=0.1+beta=2.5",
    "simpo+label_smoothing=0.1+gamma_beta_ratio=0.5",
    "hinge+gamma_beta_ratio=0.5",
    "rmipo+sft_weight=0.3",
]


@cache
def _read(name: str) -> Any:
    with gzip.open(REFERENCES / name, "rt") as file:
        return json.load(file)


@cache
def _tokens(config: str) -> dict[str, TokenizedPair]:
    rows = _read("tokenized.json.gz")["rows"][config]
    return {name: _pair(i, row) for i, (name, row) in enumerate(rows.items())}


def _pair(index: int, row: dict[str, Any]) -> TokenizedPair:
    """The recorded labels say where the response starts."""
    prompts, responses = [], []
    for side in ("chosen", "rejected"):
        ids, labels = row[f"{side}_input_ids"], row[f"{side}_labels"]
        start = next((i for i, label in enumerate(labels) if label != -100), len(ids))
        prompts.append(ids[:start])
        responses.append(ids[start:])
    same = prompts[0] == prompts[1]
    return TokenizedPair(index, prompts[0], *responses, None if same else prompts[1])


@cache
def _model(name: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(REFERENCES / name, dtype=torch.float32)


def _options(variant: str) -> dict[str, Any]:
    loss_type, *changes = variant.split("+")
    named = {key: float(value) for key, value in (c.split("=") for c in changes)}
    beta = named.get("beta", 2.0)
    ratio = named.pop("gamma_beta_ratio", 0.25)
    return {
        "loss_type": loss_type,
        "gamma_scaled_by_beta": True,
        "sft_weight": 0.0,
        "prior_context": "none",
        # Theirs is inside beta, ours outside.
        "simpo_gamma": beta * ratio,
        **named,
    }


def _run(
    model: PreTrainedModel, pairs: list[TokenizedPair], variant: str, packing: bool, tmp_path: Path
) -> tuple[StepOutcome, pair_values.PairValues]:
    args = RMiPOConfig(str(tmp_path), **_options(variant))
    model.zero_grad()
    step = PairStep(model, args, max_tokens=10**6, packing=packing)
    outcome = step.train(pairs, lambda loss: loss.backward())
    assert not outcome.dropped
    return outcome, pair_values.concat(outcome.values)


def _close(ours: torch.Tensor, recorded: list[float], what: str) -> None:
    torch.testing.assert_close(
        ours.double(),
        torch.tensor(recorded, dtype=torch.float64),
        atol=VALUE,
        rtol=0,
        msg=lambda m: f"{what}: {m}",
    )


def _check(
    outcome: StepOutcome, values: pair_values.PairValues, recorded: dict[str, Any], what: str
) -> None:
    _close(outcome.loss, recorded["loss"], f"{what} loss")
    _close(values.loss, recorded["losses"], f"{what} losses")
    for name in ("chosen_logps", "rejected_logps"):
        _close(getattr(values, name), recorded[name], f"{what} {name}")
    if "gamma" in recorded:
        _close(values.gamma, recorded["gamma"], f"{what} gamma")
        _close(values.pmi_gap, recorded["delta_pmi"], f"{what} pmi_gap")
        _close(values.chosen_pmi, recorded["chosen_pmi"], f"{what} chosen_pmi")
        _close(values.rejected_pmi, recorded["rejected_pmi"], f"{what} rejected_pmi")
    assert values.chosen_length.tolist() == recorded.get(
        "chosen_lengths", values.chosen_length.tolist()
    )


def _check_gradients(model: PreTrainedModel, recorded: dict[str, Any], what: str) -> None:
    """Norm of every parameter's gradient and eight numbers of it, relative to the total norm."""
    total = recorded["total_norm"]
    # Of a pair of two equal sides the gradient is 0 in truth, and rounding is all there is.
    limit = GRADIENT * total + 5e-6
    squares = 0.0
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, f"{what}: {name} has no gradient"
        norm = gradient.double().norm().item()
        squares += norm**2
        assert abs(norm - recorded["norm"][name]) <= limit, f"{what}: norm of {name}"
        if name not in recorded["slice"]:
            continue
        if gradient.ndim == 1:
            part = gradient[:8]
        else:
            part = gradient[5 if gradient.shape[0] > 100 else 0, :8]
        wanted = torch.tensor(recorded["slice"][name])
        assert (part - wanted).abs().max() <= limit, f"{what}: slice of {name}"
    assert abs(squares**0.5 - total) <= limit, f"{what}: total norm"


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("config", ["keep_end", "keep_start", "no_trunc"])
@pytest.mark.parametrize("name", ["model_random", "model_sft"])
def test_every_single_pair(name: str, config: str, packing: bool, tmp_path: Path) -> None:
    model = _model(name)
    recorded = _read("pairs.json.gz")[f"{name}/f32/{config}"]["single"]
    assert len(recorded) == 26
    checked = 0
    for pair_name, values in recorded.items():
        pair = _tokens(config)[pair_name]
        if packing and pair.rejected_prompt_ids is not None:
            continue  # joint encoding gave the two sides different prompts: padded only
        _check(*_run(model, [pair], "rmipo", packing, tmp_path), values, pair_name)
        if "grad" in values:
            _check_gradients(model, values["grad"], pair_name)
        checked += 1
    assert checked >= (15 if packing else 26)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["model_random", "model_sft"])
def test_every_batch_and_variant(name: str, variant: str, tmp_path: Path) -> None:
    model = _model(name)
    recorded = _read("pairs.json.gz")[f"{name}/f32/keep_end"]["batch"]
    assert sorted(recorded) == BATCHES
    for batch_name, batch in recorded.items():
        pairs = [_tokens("keep_end")[pair_name] for pair_name in batch["names"]]
        what = f"{batch_name} {variant}"
        _check(*_run(model, pairs, variant, False, tmp_path), batch[variant], what)
        _check_gradients(model, batch[variant]["grad"], what)


@pytest.mark.parametrize(
    "case", ["empty_chosen", "empty_rejected", "eos_only_chosen", "empty_chosen+qa_0"]
)
@pytest.mark.parametrize("packing", [False, True])
def test_what_is_nan_there_is_finite_and_reported_here(
    case: str, packing: bool, tmp_path: Path
) -> None:
    """A response of one token has no prior: gap 0, gamma_max, counted as undefined."""
    recorded = _read("nan_cases.json.gz")[case]
    assert recorded["rmipo"]["loss"] == "NaN"
    model = _model("model_sft")
    pairs = [_pair(i, row) for i, row in enumerate(recorded["rows"])]
    outcome, values = _run(model, pairs, "rmipo", packing, tmp_path)
    assert torch.isfinite(outcome.loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert values.gamma[0] == pytest.approx(1.6)
    assert values.pmi_gap[0] == 0
    reduced = pair_values.reduce([values], RMiPOConfig(str(tmp_path)))
    assert reduced["rmipo/pmi_undefined"] == pytest.approx(1 / len(pairs))
    assert all(value == value for value in reduced.values())
    for variant in ("simpo", "hinge", "simper"):
        _check(*_run(model, pairs, variant, packing, tmp_path), recorded[variant], case)


def test_a_response_without_tokens_is_an_error_not_nan(tmp_path: Path) -> None:
    recorded = _read("nan_cases.json.gz")["max_prompt_length==max_length(64)"]
    pairs = [_pair(i, row) for i, row in enumerate(recorded["rows"])]
    with pytest.raises(ValueError, match="must have a token"):
        _run(_model("model_sft"), pairs, "rmipo", False, tmp_path)


@pytest.mark.parametrize("run", ["lora_rmipo_f32", "lora_simpo_f32", "lora_rmipo_sftbase_f32"])
def test_recorded_runs_through_the_trainer(run: str, tmp_path: Path) -> None:
    """20 LoRA steps, batch 2 x accumulation 2: the loss of every step within 1e-4."""
    recorded = _read("train_runs.json.gz")[run]
    rows = json.loads((REFERENCES / "train_pairs.json").read_text())
    order = [i for step in recorded["steps"] for micro in step["micro"] for i in micro["idx"]]
    base = AutoModelForCausalLM.from_pretrained(
        REFERENCES / recorded["base_model"], dtype=torch.float32
    )
    model = PeftModel.from_pretrained(base, REFERENCES / "lora_init", is_trainable=True)
    args = RMiPOConfig(
        str(tmp_path),
        **_options(recorded["loss_type"]),
        packing=False,
        tokenization="authors",
        max_length=256,
        max_prompt_length=128,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=recorded["lr"],
        warmup_steps=2,
        length_balance="off",
        end_anchor=0.0,
        max_steps=20,
        logging_steps=1,
        save_strategy="no",
        train_sampling_strategy="sequential",
        disable_tqdm=True,
    )
    trainer = RMiPOTrainer(
        model,
        args,
        train_dataset=[rows[i] for i in order],
        processing_class=AutoTokenizer.from_pretrained(REFERENCES / "tokenizer"),
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == len(recorded["steps"]) == 20
    for log, step in zip(logs, recorded["steps"], strict=True):
        assert log["loss"] == pytest.approx(step["mean_loss"], abs=1e-4)
        assert log["grad_norm"] == pytest.approx(step["trainer_log"]["grad_norm"], rel=1e-3)
        gammas = [g for micro in step["micro"] for g in micro.get("gamma", [])]
        if gammas:
            assert log["rmipo/gamma"] == pytest.approx(sum(gammas) / len(gammas), abs=1e-4)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for name, norm in recorded["final"]["norm"].items():
        assert trained[name].norm().item() == pytest.approx(norm, abs=1e-4, rel=1e-3)
