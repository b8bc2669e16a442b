"""Ctrl-C: the step in work is finished, the run saved, the handler put back, the run resumable."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer, TrainerCallback

from rmipo_lite.checkpoints.sealed_folder import checkpoints
from rmipo_lite.checkpoints.trainer_mixin import newest_valid_checkpoint
from rmipo_lite.training.interrupt import GracefulInterrupt
from tests.kit import equal_weights, make_trainer, tiny_peft, trained_weights


class PressCtrlC(TrainerCallback):
    """Sends SIGINT in the middle of a step, before the optimizer's update."""

    def __init__(self, step: int, times: int = 1, number: int = signal.SIGINT) -> None:
        self.step, self.times, self.number = step, times, number

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
@pytest.mark.parametrize("step", [4, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 6))])
def test_one_ctrl_c_finishes_the_step_saves_and_resumes_exactly(
    tmp_path: Path, step: int, strategy: str
) -> None:
    options: dict[str, Any] = {
        "save_strategy": strategy,
        "eval_strategy": strategy,
        "save_steps": 5,
        "eval_steps": 5,
    }
    before = signal.getsignal(signal.SIGINT)
    interrupt = GracefulInterrupt()
    stopped = make_trainer(tmp_path, callbacks=[interrupt, PressCtrlC(step)], **options)
    stopped.train()
    assert signal.getsignal(signal.SIGINT) is before
    assert interrupt.stopped_at_step == stopped.state.global_step == step
    assert newest_valid_checkpoint(tmp_path)[0] == tmp_path / f"checkpoint-{step}"

    resumed = make_trainer(tmp_path, model=tiny_peft(), callbacks=[GracefulInterrupt()], **options)
    resumed.train(resume_from_checkpoint=True)
    whole = make_trainer(tmp_path / "whole", **options)
    whole.train()
    assert resumed.state.global_step == 12
    assert equal_weights(trained_weights(resumed), trained_weights(whole))


def test_sigterm_is_heard_as_ctrl_c_is(tmp_path: Path) -> None:
    """By it clusters end a job; killed in the middle of a step it would lose what it did."""
    before = signal.getsignal(signal.SIGTERM)
    interrupt = GracefulInterrupt()
    press = PressCtrlC(4, number=signal.SIGTERM)
    make_trainer(tmp_path, callbacks=[interrupt, press]).train()
    assert signal.getsignal(signal.SIGTERM) is before
    assert interrupt.stopped_at_step == 4
    assert newest_valid_checkpoint(tmp_path)[0] == tmp_path / "checkpoint-4"


def test_a_second_ctrl_c_stops_at_once_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    interrupt = GracefulInterrupt()
    trainer = make_trainer(tmp_path, callbacks=[interrupt, PressCtrlC(4, times=2)], save_steps=3)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert interrupt.stopped_at_step is None
    assert signal.getsignal(signal.SIGINT) is before
    assert newest_valid_checkpoint(tmp_path) == (tmp_path / "checkpoint-3", [])


def test_ctrl_c_during_a_save_lets_the_save_finish(tmp_path: Path) -> None:
    class InSave(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                os.kill(os.getpid(), signal.SIGINT)

    interrupt = GracefulInterrupt()
    make_trainer(tmp_path, callbacks=[interrupt, InSave()], save_steps=2).train()
    assert interrupt.stopped_at_step == 3  # the step after the save at 2
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3"]


def test_the_handler_is_put_back_when_training_raises(tmp_path: Path) -> None:
    class Fail(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise RuntimeError("planted")

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(RuntimeError, match="planted"):
        make_trainer(tmp_path, callbacks=[GracefulInterrupt(), Fail()]).train()
    assert signal.getsignal(signal.SIGINT) is before


def test_works_as_a_context_manager_around_a_stock_trainer(tmp_path: Path) -> None:
    interrupt = GracefulInterrupt()
    trainer = make_trainer(
        tmp_path, kind=Trainer, callbacks=[interrupt, PressCtrlC(2)], save_strategy="no"
    )
    with interrupt:
        trainer.train()
    assert interrupt.stopped_at_step == 2


def test_outside_the_main_thread_no_handler_is_installed_and_request_works(tmp_path: Path) -> None:
    interrupt = GracefulInterrupt()
    trainer = make_trainer(tmp_path, callbacks=[interrupt], save_strategy="no")
    seen: list[object] = []

    class Ask(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(signal.getsignal(signal.SIGINT))
            interrupt.request()

    trainer.add_callback(Ask())
    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join(60)
    assert seen == [before]
    assert interrupt.stopped_at_step == 1
