from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast, TrainerCallback

from rmipo_lite.config import RMiPOConfig
from rmipo_lite.step import pair_step as step_module
from rmipo_lite.training.trainer import RMiPOTrainer
from tests.conftest import REFERENCES
from tests.kit import random_pairs, tiny_model

MODEL = REFERENCES / "model_sft"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(REFERENCES / "tokenizer")


def _trainer(tmp_path: Path, tokenizer: Any, model: Any = None, count: int = 8, **options: Any):
    settings = {
        "max_steps": 3,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "disable_tqdm": True,
        **options,
    }
    return RMiPOTrainer(
        tiny_model() if model is None else model,
        RMiPOConfig(str(tmp_path), **settings),
        train_dataset=random_pairs(count),
        eval_dataset=random_pairs(5, seed=9),
        processing_class=tokenizer,
        peft_config="auto",
    )


def _weights(trainer: RMiPOTrainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def _losses(trainer: RMiPOTrainer) -> list[float]:
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def test_batch_times_accumulation_is_one_step(tmp_path: Path, tokenizer: Any) -> None:
    """8x1 = 1x8 = 4x2, and the same cut by tokens, within 1e-5 in every weight after 3 steps."""
    cuts = [
        {"per_device_train_batch_size": 8},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 8, "max_tokens_per_microstep": 1},
        {"per_device_train_batch_size": 8, "max_tokens_per_microstep": 80},
        {"per_device_train_batch_size": 8, "packing": False},
    ]
    runs = []
    for i, cut in enumerate(cuts):
        trainer = _trainer(tmp_path / str(i), tokenizer, **cut)
        assert trainer.args.pairs_per_step == 8
        trainer.train()
        runs.append((_losses(trainer), _weights(trainer)))
    for losses, weights in runs[1:]:
        assert losses == pytest.approx(runs[0][0], abs=1e-5)
        for name, weight in weights.items():
            # Adam divides by the gradient's size, so where it is rounding only, so is the sign.
            torch.testing.assert_close(weight, runs[0][1][name], atol=1e-4, rtol=0)


def test_the_callers_options_stay_as_they_are(tmp_path: Path, tokenizer: Any) -> None:
    args = RMiPOConfig(str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=4)
    RMiPOTrainer(tiny_model(), args, train_dataset=random_pairs(4), processing_class=tokenizer)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (2, 4)


def test_training_lowers_the_loss_and_logs_the_method(tmp_path: Path, tokenizer: Any) -> None:
    trainer = _trainer(tmp_path, tokenizer, max_steps=20, per_device_train_batch_size=8)
    before = trainer.evaluate(trainer.train_dataset)
    trainer.train()
    after = trainer.evaluate(trainer.train_dataset)
    assert after["eval_loss"] < before["eval_loss"] - 0.3
    assert after["eval_rewards/accuracies"] == 1.0
    log = next(log for log in trainer.state.log_history if "loss" in log)
    for name in (
        "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins",
        "logps/chosen", "logps/rejected", "lengths/chosen", "lengths/rejected", "num_tokens",
        "rmipo/gamma", "rmipo/gamma_std", "rmipo/gamma_at_max", "rmipo/gamma_at_min",
        "rmipo/pmi_gap",
        "rmipo/pmi_chosen", "rmipo/pmi_rejected", "rmipo/pmi_undefined", "grad_norm",
    ):  # fmt: skip
        assert name in log, name
    assert 0.3 <= log["rmipo/gamma"] <= 1.6


def test_the_first_logged_loss_is_the_evaluation_loss(tmp_path: Path, tokenizer: Any) -> None:
    bare: dict[str, Any] = {"length_balance": "off", "end_anchor": 0.0, "sft_weight": 0.0}
    trainer = _trainer(tmp_path, tokenizer, max_steps=1, per_device_train_batch_size=8, **bare)
    evaluated = trainer.evaluate(trainer.train_dataset)
    trainer.train()
    log = next(log for log in trainer.state.log_history if "loss" in log)
    assert log["loss"] == pytest.approx(evaluated["eval_loss"], abs=1e-6)
    for name in ("rewards/margins", "rmipo/gamma", "rmipo/pmi_gap", "logps/chosen"):
        assert log[name] == pytest.approx(evaluated[f"eval_{name}"], abs=1e-5)


def test_evaluation_changes_nothing_in_the_run(tmp_path: Path, tokenizer: Any) -> None:
    quiet = _trainer(tmp_path / "a", tokenizer)
    quiet.train()
    watched = _trainer(tmp_path / "b", tokenizer, eval_strategy="steps", eval_steps=1)
    watched.train()
    assert any("eval_loss" in log for log in watched.state.log_history)
    for name, weight in _weights(quiet).items():
        assert torch.equal(weight, _weights(watched)[name])


def test_no_field_is_called_labels(tmp_path: Path, tokenizer: Any) -> None:
    trainer = _trainer(tmp_path, tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    assert list(batch) == ["pairs"]
    assert not trainer.model_accepts_loss_kwargs


class _Stop(TrainerCallback):
    def __init__(self, at: int) -> None:
        self.at = at

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            control.should_training_stop = True


_QUICK = [(2, "cached"), (3, "live"), (4, "refresh:3")]
_SLOW = [(1, "live"), (1, "cached"), (2, "live"), (3, "cached"), (5, "live"), (5, "cached")]


@pytest.mark.parametrize(
    ("stop", "prior"), [*_QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in _SLOW)]
)
def test_resume_is_bit_for_bit(stop: int, prior: str, tmp_path: Path, tokenizer: Any) -> None:
    """Within and across epochs (2 steps each), with a short last batch."""
    options = {
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 1,
        "count": 7,
        "prior": prior,
    }
    whole = _trainer(tmp_path / "whole", tokenizer, **options)
    whole.train()
    first = _trainer(tmp_path / "cut", tokenizer, **options)
    first.add_callback(_Stop(stop))
    first.train()
    second = _trainer(tmp_path / "cut", tokenizer, **options)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 6
    for name, weight in _weights(whole).items():
        assert torch.equal(weight, _weights(second)[name]), name
    assert _losses(second)[-1] == _losses(whole)[-1]
    assert second.state.log_history[-2]["num_tokens"] == whole.state.log_history[-2]["num_tokens"]


@pytest.mark.parametrize("pairs_at_a_time", [4, 1])
def test_out_of_memory_in_a_run_changes_no_number_and_is_in_the_checkpoint(
    pairs_at_a_time: int, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory for one pair only from step 2 on; then (1) not even for that without checkpointing."""
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4, "save_total_limit": 9}
    whole = _trainer(tmp_path / "whole", tokenizer, **options)
    whole.train()
    trainer = _trainer(tmp_path / "short", tokenizer, **options)
    score = step_module.scored_hidden
    rooms = []

    def short(model, inputs):
        if trainer.state.global_step >= 1 and model.training and torch.is_grad_enabled():
            pairs = (len(inputs.cu_seqlens) - 1) // 2
            enough = trainer.pair_step.checkpointing if pairs_at_a_time == 1 else pairs == 1
            if pairs > 1 or not enough:
                rooms.append(pairs)
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return score(model, inputs)

    monkeypatch.setattr(step_module, "scored_hidden", short)
    trainer.train()
    assert rooms[0] == 4
    assert trainer.pair_step.checkpointing is (pairs_at_a_time == 1)
    assert _losses(trainer) == pytest.approx(_losses(whole), abs=1e-5)
    for name, weight in _weights(trainer).items():
        torch.testing.assert_close(weight, _weights(whole)[name], atol=1e-4, rtol=0)
    # A resumed run starts with what was learnt about the memory, not with the next failure.
    again = _trainer(tmp_path / "short", tokenizer, **{**options, "max_steps": 5})
    count = len(rooms)
    again.train(resume_from_checkpoint=True)
    assert again.pair_step.max_tokens == trainer.pair_step.max_tokens
    assert again.pair_step.checkpointing == trainer.pair_step.checkpointing
    assert len(rooms) == count


def test_another_number_of_tokens_takes_effect_when_resumed(tmp_path: Path, tokenizer: Any) -> None:
    options = {"save_strategy": "steps", "save_steps": 1}
    _trainer(tmp_path, tokenizer, max_steps=1, max_tokens_per_microstep=60, **options).train()
    for asked, wanted in ((30, 30), (60, 60)):
        again = _trainer(
            tmp_path, tokenizer, max_steps=2, max_tokens_per_microstep=asked, **options
        )
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        assert (again.pair_step.max_tokens, again.pair_step.budget_no_grad) == (wanted, wanted)


def _poisoned(trainer: RMiPOTrainer, rows: set[int]) -> None:
    """Pairs of these rows have a NaN in their loss."""
    step = trainer.pair_step
    forward = step._forward

    def poisoned(pairs, prior_of):
        values, losses, *rest = forward(pairs, prior_of)
        if any(pair.row in rows for pair in pairs):
            losses = losses * torch.nan
        return values, losses, *rest

    step._forward = poisoned


def test_a_pair_that_is_not_finite_is_named_counted_and_never_shown_as_zero(
    tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = _trainer(tmp_path, tokenizer, max_steps=4)
    _poisoned(trainer, {3})
    trainer.train()
    assert {entry["row"] for entry in trainer.dropped_pairs} == {3}
    assert "1 pair(s) dropped, loss or gradient not finite (row 3)" in capsys.readouterr().out
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert all(loss > 0 for loss in _losses(trainer))
    assert trainer.state.log_history[-2]["rmipo/dropped_pairs"] == len(trainer.dropped_pairs)


def test_a_run_of_such_steps_stops_and_leaves_the_weights(tmp_path: Path, tokenizer: Any) -> None:
    trainer = _trainer(tmp_path, tokenizer, max_steps=9, max_dropped_in_a_row=2, weight_decay=0.1)
    before = _weights(trainer)
    _poisoned(trainer, set(range(8)))
    with pytest.raises(FloatingPointError, match="stopped at step 2: 2 optimizer steps in a row"):
        trainer.train()
    for name, weight in _weights(trainer).items():
        assert torch.equal(weight, before[name])
    assert _losses(trainer) == []


def test_a_model_that_cannot_pack_says_so_and_trains(
    tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("bloom", vocab_size=97, hidden_size=32, n_layer=2, n_head=4)
    model = AutoModelForCausalLM.from_config(config)
    trainer = _trainer(tmp_path, tokenizer, model=model)
    out = capsys.readouterr().out
    assert out.count("Packed batches are off for this model, padded ones are used") == 1
    trainer.train()
    assert len(_losses(trainer)) == 3


def test_trained_weights_are_the_adapters_only(tmp_path: Path, tokenizer: Any) -> None:
    trainer = _trainer(tmp_path, tokenizer)
    frozen = {n: p.clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    before = _weights(trainer)
    trainer.train()
    assert all("lora_" in name for name in before)
    for name, parameter in trainer.model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name])
    moved = [n for n, w in _weights(trainer).items() if not torch.equal(w, before[n])]
    assert len(moved) == len(before)


@pytest.mark.parametrize("reentrant", [None, False])
def test_checkpointing_gives_the_same_run(
    reentrant: bool | None, tmp_path: Path, tokenizer: Any
) -> None:
    plain = _trainer(tmp_path / "a", tokenizer)
    plain.train()
    name = "activation_checkpointing"
    if name not in RMiPOConfig.__dataclass_fields__:
        name = "gradient_checkpointing"  # transformers before 5.20
    options = {name: True}
    if reentrant is not None:
        options[f"{name}_kwargs"] = {"use_reentrant": reentrant}
    recomputed = _trainer(tmp_path / "b", tokenizer, **options)
    recomputed.train()
    for key, weight in _weights(plain).items():
        torch.testing.assert_close(weight, _weights(recomputed)[key], atol=1e-6, rtol=0)


def test_raw_rows_are_read_reported_and_clamped(
    tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"prompt": "User: Hi\nAssistant:", "chosen": " Hello.", "rejected": " No."},
        {"prompt": "User: Hi\nAssistant:", "chosen": " same", "rejected": " same"},
        {"prompt": None, "chosen": " a", "rejected": " b"},
        {"prompt": "User: Who?\nAssistant:", "chosen": " I am.", "rejected": " You."},
    ]
    trainer = RMiPOTrainer(
        MODEL,  # a Path, as train() takes one too
        RMiPOConfig(str(tmp_path), max_steps=1, max_length=10**6, disable_tqdm=True),
        train_dataset=rows,
        eval_dataset={"same": rows, "other": rows[:1]},
        processing_class=tokenizer,
    )
    report = trainer.data_report
    assert (report.total, report.kept) == (4, 2)
    assert (
        "max_length 1000000 is more than the model's context: 2048 is used"
        in capsys.readouterr().out
    )
    metrics = trainer.evaluate()
    assert {"eval_same_loss", "eval_other_loss"} <= metrics.keys()


def test_one_process_takes_the_first_of_several_cards(
    tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    args = RMiPOConfig(str(tmp_path), use_cpu=True)
    args._n_gpu = 2
    RMiPOTrainer(tiny_model(), args, train_dataset=random_pairs(2), processing_class=tokenizer)
    assert args.n_gpu == 1
    said = capsys.readouterr().out
    assert "2 GPUs are here and one process, which uses the first" in said
    assert "rmipo-lite train --num_processes 2" in said


def test_quantising_a_loaded_model_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    from rmipo_lite.planning.quantization import nf4_config

    args = RMiPOConfig(str(tmp_path))
    with pytest.raises(ValueError, match="for a model given by name or folder"):
        RMiPOTrainer(
            tiny_model(), args, processing_class=tokenizer, quantization_config=nf4_config(args)
        )


def test_signature_users_know() -> None:
    names = list(inspect.signature(RMiPOTrainer.__init__).parameters)[1:]
    assert names == [
        "model", "args", "train_dataset", "eval_dataset", "processing_class", "peft_config",
        "quantization_config", "callbacks", "optimizers", "ref_model", "split", "eval_split",
    ]  # fmt: skip


def test_nothing_is_pickled(tmp_path: Path, tokenizer: Any) -> None:
    trainer = _trainer(tmp_path, tokenizer, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    files = [Path(folder) / f for folder, _, names in os.walk(tmp_path) for f in names]
    assert any(f.name == "adapter_model.safetensors" for f in files)
    assert not [f for f in files if f.suffix in {".bin", ".pt", ".pth", ".pkl"}]
