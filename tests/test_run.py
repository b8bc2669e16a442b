"""`train()` from start to end on a real small model, and what it leaves behind."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraModel, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.utils import logging

import rmipo_lite
from rmipo_lite import run
from rmipo_lite.training import rehearsal
from rmipo_lite.training.trainer import RMiPOTrainer
from tests.conftest import REFERENCES

MODEL = REFERENCES / "model_sft"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(REFERENCES / "tokenizer")


def _rows(count: int = 24) -> list[dict[str, str]]:
    return [
        {
            "prompt": f"User: What is {i} and {i}?\nAssistant:",
            "chosen": f" It is {2 * i}, I think.",
            "rejected": " The sea is blue." if i % 2 else " I am not sure about that.",
        }
        for i in range(count)
    ]


def _train(model: Any, tokenizer: Any, folder: Path, **options: Any) -> rmipo_lite.TrainResult:
    settings = {
        "max_steps": 3, "learning_rate": 5e-3, "per_device_train_batch_size": 8,
        "eval_completions": 0, "sample_prompts": 0, **options,
    }  # fmt: skip
    dataset = settings.pop("dataset", None) or _rows()
    return rmipo_lite.train(model, dataset, tokenizer=tokenizer, output_dir=folder, **settings)


def test_from_a_folder_to_a_saved_adapter(
    tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = _train(str(MODEL), tokenizer, tmp_path / "run")
    out = capsys.readouterr().out
    assert "24 in = 24 kept + 0 dropped + 0 refused" in out
    assert out.index("rows  ") < out.index("step ")  # the report comes before the training
    assert result.metrics["eval_loss"] < result.metrics_before["eval_loss"]
    assert result.stopped_at_step is None
    assert [log["step"] for log in result.history if "loss" in log] == [3]
    assert [log["step"] for log in result.history if "eval_loss" in log] == [0, 3]
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "run" / "README.md").is_file()
    # The saved adapter on a fresh base is the trained model.
    fresh = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL), tmp_path / "run")
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        assert torch.equal(fresh(ids).logits, result.model.eval()(ids).logits)


@pytest.mark.slow
def test_held_out_prompts_are_answered_before_and_after(
    tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = _rows()
    result = _train(
        str(MODEL), tokenizer, tmp_path / "a", eval_dataset=rows[:5], sample_prompts=2,
        disable_tqdm=False,
    )  # fmt: skip
    # A phase like any other, with its time left: of a real model it takes minutes on a CPU.
    assert "answering samples, 128 tokens" in capsys.readouterr().out
    assert result.held_out_prompts == [row["prompt"] for row in rows[:5]]
    assert [prompt for prompt, *_ in result._samples] == result.held_out_prompts[:2]
    assert all(before and after for _, before, after in result._samples)
    assert "What is 1 and 1?" in result._repr_html_()
    none = _train(str(MODEL), tokenizer, tmp_path / "b", eval_dataset=rows[:5], sample_prompts=0)
    assert none._samples is None


def test_a_look_at_the_answers_never_ends_a_run(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(rmipo_lite.TrainResult, "compare", fail)
    result = _train(str(MODEL), tokenizer, tmp_path / "run", sample_prompts=1)
    assert "No samples: RuntimeError: planted" in capsys.readouterr().out
    assert result.metrics["eval_loss"] > 0


def test_callbacks_are_called(tokenizer: Any, tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 2

    result = _train(str(MODEL), tokenizer, tmp_path / "run", callbacks=[Stop()])
    assert result.history[-1]["step"] == 2


def test_twice_on_one_model_goes_on_with_one_adapter(tokenizer: Any, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    first = _train(model, tokenizer, tmp_path / "a")
    trainable = {
        n: p.detach().clone() for n, p in first.model.named_parameters() if p.requires_grad
    }
    second = _train(model, tokenizer, tmp_path / "b")
    assert second.model is first.model
    assert {n for n, p in second.model.named_parameters() if p.requires_grad} == set(trainable)
    assert second.metrics_before["eval_loss"] == pytest.approx(first.metrics["eval_loss"], abs=1e-6)
    fresh = _train(model, tokenizer, tmp_path / "c", peft_config="new")
    assert fresh.metrics_before["eval_loss"] == pytest.approx(
        first.metrics_before["eval_loss"], abs=1e-6
    )


@pytest.mark.parametrize("adapted", [False, True])
def test_cut_short_inside_peft_the_model_is_as_before(
    adapted: bool, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL).eval()
    first = _train(model, tokenizer, tmp_path / "a") if adapted else None
    names, trained = _parameters(model)
    logits = model(torch.arange(1, 20)[None]).logits
    real, calls = LoraModel._create_and_replace, []

    def interrupted(*args: Any, **kwargs: Any) -> None:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        real(*args, **kwargs)

    monkeypatch.setattr(LoraModel, "_create_and_replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _train(model, tokenizer, tmp_path / "b", peft_config="new")
    monkeypatch.undo()
    assert _parameters(model) == (names, trained)
    assert torch.equal(model(torch.arange(1, 20)[None]).logits, logits)
    again = _train(model, tokenizer, tmp_path / "c")
    assert first is None or again.model is first.model


def _parameters(model: torch.nn.Module) -> tuple[list[str], list[bool]]:
    pairs = list(model.named_parameters())
    return [name for name, _ in pairs], [p.requires_grad for _, p in pairs]


@pytest.mark.parametrize("checkpointing", [None, True])
def test_what_the_run_changed_is_put_back(
    checkpointing: bool | None, tokenizer: Any, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL).eval()
    model.config.use_cache = True
    attention = model.config._attn_implementation
    side = tokenizer.padding_side
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    _train(model, tokenizer, tmp_path / "run", gradient_checkpointing=checkpointing)
    assert not any(layer.gradient_checkpointing for layer in model.model.layers)
    assert not model.get_input_embeddings()._forward_hooks
    assert not any("forward" in vars(module) for module in model.modules())
    assert not model.training
    assert model.config.use_cache is True
    assert model.config._attn_implementation == attention
    assert tokenizer.padding_side == side
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])


def test_another_run_is_never_written_over(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="another run is never written over"):
        _train(str(MODEL), tokenizer, tmp_path / "run")


def test_default_folders_are_named_after_the_model(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = [
        rmipo_lite.train(
            str(MODEL), _rows(), tokenizer=tokenizer, max_steps=1, learning_rate=1e-3
        ).output_dir.name
        for _ in range(2)
    ]
    assert names == ["rmipo-model_sft", "rmipo-model_sft-2"]


def test_resume_gives_the_uninterrupted_weights(tokenizer: Any, tmp_path: Path) -> None:
    """Cut after step 2 of 4: a later call finds the folder with its checkpoints and no more."""
    options = {"max_steps": 4, "save_steps": 1, "save_total_limit": 9}
    whole = _train(str(MODEL), tokenizer, tmp_path / "whole", **options)
    (tmp_path / "cut").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "cut" / "checkpoint-2")
    resumed = _train(str(MODEL), tokenizer, tmp_path / "cut", **options, resume=True)
    ours = dict(resumed.model.named_parameters())
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, ours[name]), name


def test_an_evaluation_set_of_ones_own(tokenizer: Any, tmp_path: Path) -> None:
    result = _train(
        str(MODEL),
        tokenizer,
        tmp_path / "run",
        eval_dataset=_rows(5),
        max_steps=1,
        loss_type="simper",
    )
    assert "eval_rewards/accuracies" in result.metrics
    assert "eval_rmipo/gamma" not in result.metrics


def test_too_few_pairs_to_hold_any_out(
    tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = _train(str(MODEL), tokenizer, tmp_path / "run", dataset=_rows(3), max_steps=1)
    assert result.metrics_before == {}
    assert "Too few pairs or prompts to hold any out" in capsys.readouterr().out


def test_a_short_run_says_how_many_pairs_it_evaluates(
    tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"dataset": _rows(200), "max_steps": 2, "eval_completions": 0, "sample_prompts": 0}
    options |= {"per_device_train_batch_size": 4}
    options |= {"learning_rate": 1e-3}  # a search would be part of the run
    short = _train(str(MODEL), tokenizer, tmp_path / "a", **{**options, "max_steps": 3})
    assert "8 of 10 held-out pairs are evaluated: the run is short" in capsys.readouterr().out
    assert len(short.held_out_prompts) == 8
    whole = _train(str(MODEL), tokenizer, tmp_path / "b", **{**options, "max_steps": 15})
    assert len(whole.held_out_prompts) == 10
    assert "held-out pairs are evaluated" not in capsys.readouterr().out


def test_conversations_need_a_template_and_plain_gives_one(tokenizer: Any, tmp_path: Path) -> None:
    rows = [
        {
            "prompt": [{"role": "user", "content": f"What is {i}?"}],
            "chosen": [{"role": "assistant", "content": f"A number, {i}."}],
            "rejected": [{"role": "assistant", "content": "No."}],
        }
        for i in range(10)
    ]
    with pytest.raises(ValueError, match='chat_template="plain"'):
        _train(str(MODEL), tokenizer, tmp_path / "a", dataset=rows)
    result = _train(
        str(MODEL), tokenizer, tmp_path / "b", dataset=rows, chat_template="plain", max_steps=1
    )
    assert "Assistant: " in result.tokenizer.chat_template
    assert tokenizer.chat_template is None
    saved = AutoTokenizer.from_pretrained(tmp_path / "b")
    assert saved.chat_template == result.tokenizer.chat_template


def test_quantising_a_loaded_model_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    with pytest.raises(ValueError, match="for a model given by name or folder"):
        _train(model, tokenizer, tmp_path / "run", quantization="4bit")


def test_four_bit_trains(tokenizer: Any, tmp_path: Path) -> None:
    result = _train(str(MODEL), tokenizer, tmp_path / "run", quantization="4bit")
    assert result.metrics["eval_loss"] < result.metrics_before["eval_loss"]
    moved = [p for n, p in result.model.named_parameters() if "lora_B" in n]
    assert all(p.abs().max() > 0 for p in moved)


def test_the_plan_is_told_before_and_kept(
    tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = _train(str(MODEL), tokenizer, tmp_path / "run", max_steps=20)
    out = capsys.readouterr().out
    plan = result.plan
    assert plan is not None
    assert plan.steps == 20
    assert plan.seconds is not None
    assert plan.seconds > 0
    assert out.index("Plan: 20 steps of 8 pairs, about") < out.index("steps in")
    # What the plan measured left no trace in the run.
    without = _train(
        str(MODEL), tokenizer, tmp_path / "a", max_steps=2, lr_scheduler_type="constant"
    )
    assert without.plan is not None
    assert without.plan.seconds is None


def test_a_plan_changes_nothing_in_the_run(tokenizer: Any, tmp_path: Path, monkeypatch) -> None:
    options = {"max_steps": 20, "disable_dropout": False}
    planned = _train(str(MODEL), tokenizer, tmp_path / "a", **options)
    monkeypatch.setattr(rehearsal, "_SHARE", 0.0)
    unplanned = _train(str(MODEL), tokenizer, tmp_path / "b", **options)
    losses = [[log["loss"] for log in r.history if "loss" in log] for r in (planned, unplanned)]
    assert losses[0] == losses[1]


def test_too_little_disk_is_said_before(
    tokenizer: Any, tmp_path: Path, monkeypatch, capsys
) -> None:
    usage = shutil._ntuple_diskusage(10**9, 10**9, 1000)
    monkeypatch.setattr(rehearsal.shutil, "disk_usage", lambda _: usage)
    _train(str(MODEL), tokenizer, tmp_path / "run", max_steps=1)
    assert "1000 bytes are free: some saves will fail" in capsys.readouterr().out


def test_a_result_that_cannot_be_saved_is_returned(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def full(self: Any, folder: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(rmipo_lite.TrainResult, "save", full)
        result = _train(str(MODEL), tokenizer, tmp_path / "run", max_steps=1)
    assert "NOT SAVED" in repr(result)
    assert "the adapter could not be saved" in capsys.readouterr().out
    result.save(tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / "adapter_model.safetensors").is_file()


def test_an_error_leaves_the_weights_of_the_last_step(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    real = RMiPOTrainer.training_step

    def failing(self: Any, *args: Any) -> Any:
        if self.state.global_step == 2:
            raise RuntimeError("planted")
        return real(self, *args)

    monkeypatch.setattr(RMiPOTrainer, "training_step", failing)
    with pytest.raises(RuntimeError, match="planted"):
        _train(str(MODEL), tokenizer, tmp_path / "run", max_steps=4, save_steps=1)
    out = capsys.readouterr().out
    assert f"The weights as of step 2 are in {tmp_path / 'run'}" in out
    assert "goes on from checkpoint-2" in out
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    kept = load_file(tmp_path / "run" / "checkpoint-2" / "adapter_model.safetensors")
    assert all(torch.equal(saved[name], kept[name]) for name in kept)


@pytest.mark.parametrize("evaluation", [1, 2])
def test_ctrl_c_cuts_an_evaluation_short(
    evaluation: int, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    real = run.show_progress

    def with_ctrl_c(trainer: Any) -> None:
        real(trainer)
        loop, begun = trainer.evaluation_loop, itertools.count(1)

        def pressed(*args: Any, **kwargs: Any) -> Any:
            if next(begun) == evaluation:
                os.kill(os.getpid(), signal.SIGINT)
            return loop(*args, **kwargs)

        trainer.evaluation_loop = pressed

    monkeypatch.setattr(run, "show_progress", with_ctrl_c)
    handler = signal.getsignal(signal.SIGINT)
    if evaluation == 1:  # before the first step: nothing was trained, nothing is written
        with pytest.raises(KeyboardInterrupt):
            _train(str(MODEL), tokenizer, tmp_path / "run")
        assert not list((tmp_path / "run").glob("*"))
    else:  # after the last one: the result is whole, only its numbers are missing
        result = _train(str(MODEL), tokenizer, tmp_path / "run")
        assert result.stopped_at_step is None
        assert "eval_loss" not in result.metrics
        assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    assert "Evaluation stopped after" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is handler


def test_what_options_set_for_the_process_and_on_modules_is_put_back(
    tokenizer: Any, tmp_path: Path
) -> None:
    """full_determinism, log_level and the hooks of debug, on the adapter that stays too."""

    def settings() -> tuple[Any, ...]:
        cudnn = torch.backends.cudnn
        return (
            torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark,
            logging.get_verbosity(),
        )  # fmt: skip

    model, before = AutoModelForCausalLM.from_pretrained(MODEL), settings()
    own = model.lm_head.register_forward_hook(lambda *_: None)
    result = _train(
        model, tokenizer, tmp_path / "run", max_steps=1, full_determinism=True, log_level="error",
        debug="underflow_overflow",
    )  # fmt: skip
    assert settings() == before
    hooks = [key for module in result.model.modules() for key in module._forward_hooks]
    assert hooks == [own.id]
    assert not any(module._forward_pre_hooks for module in result.model.modules())
