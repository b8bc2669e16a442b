"""Checkpoints: bit-for-bit resume, kills, damage, full disks, rotation, no pickle, no secrets."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainerCallback

from rmipo_lite.adapters.saved import AdapterError
from rmipo_lite.checkpoints import sealed_folder
from rmipo_lite.checkpoints.random_state import random_state, set_random_state
from rmipo_lite.checkpoints.sealed_folder import (
    MANIFEST,
    checkpoints,
    read_manifest,
    staged_checkpoint,
)
from rmipo_lite.checkpoints.state import load_state, save_state
from rmipo_lite.checkpoints.trainer_mixin import (
    CheckpointError,
    load_adapter_weights,
    newest_valid_checkpoint,
    verify_checkpoint,
)
from tests.conftest import ROOT
from tests.kit import (
    SafeTrainer,
    equal_weights,
    make_trainer,
    tiny_model,
    tiny_peft,
    trained_weights,
)

TRAINER_STATES = ("optimizer", "scheduler", "scaler", "rng_state", "extra_state")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run with checkpoints 2, 4, ..., 12."""
    folder = tmp_path_factory.mktemp("finished")
    make_trainer(folder).train()
    return folder


@pytest.fixture
def run_copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


# ---- resume ---------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["adamw_torch", "adamw_torch_fused"])
def uninterrupted(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Trainer:
    """A run that saved at every one of its 12 steps."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = make_trainer(folder, optim=request.param, save_steps=1)
    trainer.train()
    return trainer


@pytest.mark.parametrize("step", [1, 3, 6, 8])  # an epoch has 6 steps, its last one a short window
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    tmp_path: Path, uninterrupted: Trainer, step: int
) -> None:
    torch.manual_seed(99)  # nothing may depend on the state the new process happens to be in
    optim = uninterrupted.args.optim
    resumed = make_trainer(tmp_path, optim=optim, save_strategy="no", model=tiny_peft())
    resumed.train(resume_from_checkpoint=f"{uninterrupted.args.output_dir}/checkpoint-{step}")
    assert resumed.state.global_step == uninterrupted.state.global_step == 12
    assert equal_weights(trained_weights(uninterrupted), trained_weights(resumed))
    losses = [entry["loss"] for entry in uninterrupted.state.log_history if "loss" in entry]
    again = [entry["loss"] for entry in resumed.state.log_history if "loss" in entry]
    assert again == losses


def test_safe_checkpointing_doesnt_change_training(tmp_path: Path) -> None:
    ours = make_trainer(tmp_path / "a")
    ours.train()
    stock = make_trainer(tmp_path / "b", kind=Trainer)
    stock.train()
    assert equal_weights(trained_weights(ours), trained_weights(stock))


def test_full_model_checkpoint_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = make_trainer(tmp_path / "whole", model=tiny_model(attention_dropout=0.1), max_steps=5)
    whole.train()
    resumed = make_trainer(
        tmp_path / "other", model=tiny_model(seed=3, attention_dropout=0.1), max_steps=5
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    own, other = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(own[name], other[name]) for name in own)


def test_true_takes_the_newest_valid_and_says_what_it_skipped(
    run_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_copy / "checkpoint-12" / "optimizer.safetensors").unlink()
    trainer = make_trainer(run_copy)
    trainer.train(resume_from_checkpoint=True)
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("Resuming"))
    assert str(run_copy / "checkpoint-10") in line
    assert "checkpoint-12/optimizer.safetensors is missing" in line


def test_an_explicit_checkpoint_that_doesnt_verify_is_an_error(run_copy: Path) -> None:
    (run_copy / "checkpoint-4" / "rng_state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"checkpoint-4/rng_state.json has 2 bytes, wanted"):
        make_trainer(run_copy).train(resume_from_checkpoint=str(run_copy / "checkpoint-4"))


def test_true_without_any_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no valid checkpoint in"):
        make_trainer(tmp_path / "none").train(resume_from_checkpoint=True)


def test_weights_only_checkpoints_are_not_resumed(tmp_path: Path) -> None:
    make_trainer(tmp_path, save_only_model=True, max_steps=2).train()
    found, skipped = newest_valid_checkpoint(tmp_path)
    assert found is None
    assert "holds only weights" in skipped[0][1]
    with pytest.raises(CheckpointError, match="holds only weights"):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_another_adapter_is_refused(finished: Path) -> None:
    other = get_peft_model(tiny_model(), LoraConfig(r=8, target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match=r"belongs to another adapter: 0 weights missing"):
        load_adapter_weights(other, finished / "checkpoint-2")


def test_extra_state_comes_back_before_training(tmp_path: Path) -> None:
    class Counting(SafeTrainer):
        taken: dict[str, Any] | None = None

        def extra_state(self) -> dict[str, Any]:
            return {"budget": 512, "cache": [[3, 0.1, float("inf")]]}

        def load_extra_state(self, state: dict[str, Any]) -> None:
            assert not self.is_in_train
            self.taken = state

    make_trainer(tmp_path, kind=Counting, max_steps=2).train()
    again = make_trainer(tmp_path, kind=Counting, max_steps=2)
    again.train(resume_from_checkpoint=True)
    assert again.taken == {"budget": 512, "cache": [[3, 0.1, float("inf")]]}


# ---- kills, damage, full disks --------------------------------------------------------------

KILLED_RUN = """
import sys, time
from pathlib import Path
from tests.kit import make_trainer
from rmipo_lite.checkpoints import sealed_folder as files
real = files._sha256
def slow(path):                       # stretch the save, so that a kill falls into it
    print("saving", flush=True)
    time.sleep(0.003)
    return real(path)
files._sha256 = slow
make_trainer(Path(sys.argv[1]), save_steps=1, num_train_epochs=50).train()
"""


@pytest.mark.slow
@pytest.mark.parametrize("delay_ms", [4, 35])
def test_kill_during_a_save_leaves_a_valid_checkpoint_and_an_exact_resume(
    tmp_path: Path, delay_ms: int
) -> None:
    folder = tmp_path / "killed"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", KILLED_RUN, str(folder)],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    while not (folder / "checkpoint-3").is_dir():
        if not process.stdout.readline():
            pytest.fail("the run to kill ended by itself")
    process.stdout.readline()  # the next save has begun
    time.sleep(delay_ms / 1000)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)

    found, _ = newest_valid_checkpoint(folder)
    assert found is not None
    saved = [read_manifest(path)["step"] for path in checkpoints(folder)]
    assert read_manifest(found)["step"] == max(saved) >= 3  # nothing lost beyond the last save
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]  # leftovers are tidied
    stop = max(saved) + 2
    resumed = make_trainer(folder, num_train_epochs=50, callbacks=[_StopAt(stop)])
    resumed.train(resume_from_checkpoint=True)
    whole = make_trainer(tmp_path / "whole", num_train_epochs=50, callbacks=[_StopAt(stop)])
    whole.train()
    assert equal_weights(trained_weights(resumed), trained_weights(whole))


def _StopAt(step: int) -> Any:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step >= step

    return Stop()


def _damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "delete":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "half":
        path.write_bytes(content[: len(content) // 2])
    elif how == "last byte":
        path.write_bytes(content[:-1])
    else:
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


def test_any_damage_to_any_file_is_found_and_named(run_copy: Path) -> None:
    newest = run_copy / "checkpoint-12"
    files = sorted(p for p in newest.rglob("*") if p.is_file())
    assert len(files) >= 12
    for path in files:
        content = path.read_bytes()
        for how in ("delete", "empty", "half", "last byte", "flip"):
            _damage(path, how)
            found, skipped = newest_valid_checkpoint(run_copy)
            assert found == run_copy / "checkpoint-10", (path.name, how)
            assert [p for p, _ in skipped] == [newest]
            assert path.name in skipped[0][1], (path.name, how)
            path.write_bytes(content)
    verify_checkpoint(newest)


def test_every_flipped_bit_of_the_manifest_is_found(run_copy: Path) -> None:
    path = run_copy / "checkpoint-2" / MANIFEST
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        path.write_bytes(
            content[:place] + bytes([content[place] ^ (1 << place % 8)]) + content[place + 1 :]
        )
        with pytest.raises(CheckpointError, match=MANIFEST):
            verify_checkpoint(path.parent)


def test_a_renamed_checkpoint_and_a_path_out_of_the_folder_are_refused(run_copy: Path) -> None:
    shutil.copytree(run_copy / "checkpoint-2", run_copy / "checkpoint-90")
    with pytest.raises(CheckpointError, match="checkpoint-90 holds step 2"):
        verify_checkpoint(run_copy / "checkpoint-90")
    path = run_copy / "checkpoint-4" / MANIFEST
    content = json.loads(path.read_text())
    content["files"]["../checkpoint-2/manifest.json"] = {"size": 1, "sha256": ""}
    path.write_text(sealed_folder._manifest_text(content))
    with pytest.raises(CheckpointError, match="leaves the checkpoint's folder"):
        verify_checkpoint(path.parent)


def test_full_disk_at_any_write_keeps_the_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.train()
    trainer.state.global_step = 3
    calls = {"left": 0}
    path_open = Path.open

    def failing(real: Any) -> Any:
        def write(*args: Any, **kwargs: Any) -> Any:
            mode = args[1] if real is path_open and len(args) > 1 else kwargs.get("mode", "r")
            if real is path_open and not {"w", "+"} & set(mode):
                return real(*args, **kwargs)
            if calls["left"] == 0:
                raise OSError(28, "No space left on device")
            calls["left"] -= 1
            return real(*args, **kwargs)

        return write

    monkeypatch.setattr(Path, "write_text", failing(Path.write_text))
    monkeypatch.setattr(Path, "open", failing(Path.open))
    monkeypatch.setattr("rmipo_lite.checkpoints.state.save_file", failing(save_file_of_state()))
    failures = 0
    while True:
        calls["left"] = failures
        try:
            trainer._write_checkpoint(None)
            break
        except CheckpointError as error:
            text = str(error)
        failures += 1
        assert "checkpoint-3 could not be saved" in text
        assert "No space left" in text
        assert "MiB are free" in text
        calls["left"] = -1  # reading again
        assert [p.name for p in tmp_path.iterdir() if "checkpoint" in p.name] == ["checkpoint-2"]
        verify_checkpoint(tmp_path / "checkpoint-2")
    assert failures > 12
    calls["left"] = -1
    verify_checkpoint(tmp_path / "checkpoint-3")


def test_a_failed_save_is_told_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = sealed_folder.seal

    def full(folder: Path, *, step: int, **rest: Any) -> None:
        if step == 4:
            raise OSError(28, "No space left on device")
        real(folder, step=step, **rest)

    monkeypatch.setattr(sealed_folder, "seal", full)
    trainer = make_trainer(tmp_path / "a", max_steps=6)
    trainer.train()
    out = capsys.readouterr().out
    assert "WARNING: checkpoint-4 could not be saved" in out
    assert "MiB are free" in out
    assert len(trainer.failed_saves) == 1
    assert [path.name for path in checkpoints(tmp_path / "a")] == ["checkpoint-2", "checkpoint-6"]
    monkeypatch.setattr(sealed_folder, "seal", real)
    whole = make_trainer(tmp_path / "b", max_steps=6)
    whole.train()
    assert equal_weights(trained_weights(trainer), trained_weights(whole))


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    class Spoil(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:  # the fourth step, whose update has just been made
                with torch.no_grad():
                    next(p for p in kwargs["model"].parameters() if p.requires_grad).fill_(
                        torch.nan
                    )

    with pytest.raises(FloatingPointError, match=r"step 4: the trained weight .*lora_A"):
        make_trainer(tmp_path, callbacks=[Spoil()]).train()
    assert newest_valid_checkpoint(tmp_path) == (tmp_path / "checkpoint-2", [])


def save_file_of_state() -> Any:
    from safetensors.torch import save_file

    return save_file


def test_interrupt_during_a_save_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupted_save() -> None:
        with staged_checkpoint(tmp_path / "checkpoint-1", step=1, run_id="a") as folder:
            (folder / "half").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted_save()
    assert list(tmp_path.iterdir()) == []


def test_a_swap_cut_between_its_two_renames_is_put_back(run_copy: Path) -> None:
    old = run_copy / f".old-checkpoint-12-{os.getpid()}"
    (run_copy / "checkpoint-12").rename(old)
    assert newest_valid_checkpoint(run_copy) == (run_copy / "checkpoint-12", [])
    assert not old.exists()


# ---- rotation, best model -------------------------------------------------------------------


def test_rotation_keeps_the_newest_and_leaves_other_runs_alone(run_copy: Path) -> None:
    stale = run_copy / "checkpoint-1000"
    stale.mkdir()
    (stale / "notes.txt").write_text("mine")
    make_trainer(run_copy, save_total_limit=1, num_train_epochs=1).train()
    left = [p.name for p in checkpoints(run_copy)]
    # checkpoints 8, 10, 12 are the earlier run's; 2, 4, 6 were replaced by the new run's
    assert left == ["checkpoint-6", "checkpoint-8", "checkpoint-10", "checkpoint-12", stale.name]
    found, skipped = newest_valid_checkpoint(run_copy)
    assert found == run_copy / "checkpoint-6"  # of the run that saved last, not the highest number
    assert "checkpoint-1000/manifest.json is missing" in skipped[0][1]


def test_best_model_survives_rotation_and_is_loaded(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, save_total_limit=1, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, metric_for_best_model="loss",
        greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    verify_checkpoint(best)
    # the "best" loss is the largest here, which the first evaluation has
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-12"]
    assert best.name == "checkpoint-2"
    saved = tiny_peft(seed=5)
    load_adapter_weights(saved, best)
    expected = {n: p.detach() for n, p in saved.named_parameters() if "lora_" in n}
    assert equal_weights(trained_weights(trainer), expected)


# ---- what is in the files -------------------------------------------------------------------


def test_a_checkpoint_holds_no_pickle_and_reads_none(run_copy: Path) -> None:
    newest = run_copy / "checkpoint-12"
    names = {p.name for p in newest.iterdir()}
    assert {f"{state}.json" for state in TRAINER_STATES} <= names
    assert "training_args.bin" not in names
    for path in newest.iterdir():
        assert path.suffix in {".json", ".safetensors", ".md"}, path.name
    bomb = b"cos\nsystem\n(S'touch " + os.fsencode(run_copy / "executed") + b"'\ntR."
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt"):
        (newest / name).write_bytes(bomb)
    make_trainer(run_copy, num_train_epochs=3).train(resume_from_checkpoint=str(newest))
    assert not (run_copy / "executed").exists()


def test_a_fresh_process_loads_the_adapter_with_equal_logits(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.train()
    folder = tmp_path / "checkpoint-2"
    loaded = PeftModel.from_pretrained(tiny_model(), folder)
    ids = torch.arange(3, 11).view(1, -1)
    trainer.model.eval()
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, trainer.model(ids).logits)
    weights = (folder / "adapter_model.safetensors").stat().st_size
    assert weights < 4 * sum(p.numel() for p in tiny_model().parameters())
    assert (folder / "tokenizer.json").is_file()


def test_secrets_reach_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret, other = "hf_" + "Zq9" * 8, "plainsecret-4711"
    monkeypatch.setenv("WANDB_API_KEY", other)
    make_trainer(tmp_path, hub_token=secret, run_name=f"run {other}", max_steps=2).train()
    for path in tmp_path.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert secret.encode() not in content, path
            assert other.encode() not in content, path
    config = json.loads((tmp_path / "checkpoint-2" / "training_config.json").read_text())
    assert config["hub_token"] == "<redacted>"
    assert config["learning_rate"] == 1e-2


def test_state_round_trip_keeps_types_and_bits(tmp_path: Path) -> None:
    shared = torch.arange(4)
    state = {
        "tensors": [shared, shared, torch.tensor(1.5), torch.ones(2, 3).T.to(torch.bfloat16)],
        3: (None, True, 0.1, float("-inf"), "x"),
        "array": np.array([1, 2**32 - 1], dtype=np.uint32),
        "nested": {"__tuple__": b"\x00\xff"},
        "numpy scalar": np.float64(0.25),
    }
    save_state(tmp_path, "s", state)
    back = load_state(tmp_path, "s")
    assert all(torch.equal(a, b) for a, b in zip(back["tensors"], state["tensors"], strict=True))
    assert back["tensors"][3].dtype == torch.bfloat16
    assert back[3] == state[3]
    assert back["array"].dtype == np.uint32
    assert np.array_equal(back["array"], state["array"])
    assert back["nested"] == state["nested"]
    with pytest.raises(TypeError, match=r"s.hook is a function; a checkpoint holds"):
        save_state(tmp_path, "s", {"hook": _damage})
    with pytest.raises(FileNotFoundError):
        load_state(tmp_path, "absent")


def test_random_state_round_trip(tmp_path: Path) -> None:
    import random

    def draw() -> tuple[float, float, float]:
        # the legacy numpy generator is the one transformers seeds
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

    random.gauss(0, 1)  # leaves a value in reserve, which is part of the state
    save_state(tmp_path, "rng", random_state())
    first = draw()
    draw()
    set_random_state(load_state(tmp_path, "rng"))
    assert draw() == first


def test_what_a_checkpoint_uploads_names_no_path_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A local stand-in of the hub: what the folder held when it was sent."""
    seen: dict[str, str] = {}

    class Api:
        def __init__(self, token: str | None = None) -> None: ...

        def upload_folder(self, *, folder_path: str, **options: Any) -> Future[str]:
            assert options["repo_id"] == "me/adapter"
            seen.update(
                {p.name: p.read_text(errors="replace") for p in Path(folder_path).iterdir()}
            )
            seen["folder"] = folder_path
            done: Future[str] = Future()
            done.set_result("https://hub/me/adapter")
            return done

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    trainer = make_trainer(tmp_path / "run", max_steps=2)
    trainer.train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    before = (checkpoint / "adapter_config.json").read_text()
    config = json.loads(before) | {"base_model_name_or_path": str(tmp_path / "my-model")}
    (checkpoint / "adapter_config.json").write_text(json.dumps(config))
    trainer.hub_model_id = "me/adapter"
    trainer._push_from_checkpoint(str(checkpoint))
    assert not [name for name in seen if name.startswith(("optimizer", "rng_state", "scheduler"))]
    assert json.loads(seen["adapter_config.json"])["base_model_name_or_path"] == "my-model"
    assert {"adapter_model.safetensors", "training_config.json"} <= seen.keys()
    assert str(tmp_path) not in "".join(seen[name] for name in seen if name.endswith(".json"))
    assert not Path(seen["folder"]).exists()
