"""A model whose layers `device_map` put on two devices: the run is that of one device.

The second device is played on the CPU, and refuses operands of two devices (`tests/mps_on_cpu`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor

from rmipo_lite.model import attention, backbone
from rmipo_lite.model.backbone import UnsupportedModelError
from rmipo_lite.parallel.group import Group
from rmipo_lite.training.sharding import refuse_parts
from tests.kit import tiny_model, train_words, trained_weights
from tests.mps_on_cpu import CPU, MPS, play_a_mac, simulated_mps


@pytest.fixture(autouse=True)
def mac(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    play_a_mac(monkeypatch)
    monkeypatch.setattr(attention, "is_trusted", lambda kind: False)  # the same path on both
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def _spread(model: Any) -> Any:
    """The first half of the layers on the CPU, the rest and an untied head elsewhere."""
    layers = len(model.model.layers)
    places: dict[str, Any] = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu"}
    places |= {f"model.layers.{i}": "mps" if i >= layers // 2 else "cpu" for i in range(layers)}
    tied = model.config.tie_word_embeddings
    places |= {"model.norm": "mps", "lm_head": "cpu" if tied else "mps"}
    return dispatch_model(model, places, main_device="cpu", force_hooks=True)


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "padded": {"packing": False},
    "checkpointing": {"gradient_checkpointing": True},
    "cached prior": {"prior": "cached"},
    "live reference": {"loss_type": "dpo", "reference": "live"},
    "cached reference": {"loss_type": "dpo"},
    "in full": {"peft_config": None},
    "tied": {"tied": True},
    "adapter on the head": {"target_modules": ["q_proj", "lm_head"]},
    "answers": {"eval_completions": 1, "sample_prompts": 1},
}


_QUICK = ("default",)


@pytest.mark.parametrize(
    "name", [n if n in _QUICK else pytest.param(n, marks=pytest.mark.slow) for n in OPTIONS]
)
def test_the_run_is_that_of_one_device(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"kernel_impl": "torch", "max_steps": 2, "max_tokens_per_microstep": 60,
               "gradient_checkpointing": False, **OPTIONS[name]}  # fmt: skip
    tied = options.pop("tied", False)

    def weights(model: Any, folder: Path) -> dict[str, Tensor]:
        AcceleratorState._reset_state(reset_partial_state=True)
        trained = trained_weights(train_words(model, folder, **options).model)
        return {name: torch.tensor(weight.tolist()) for name, weight in trained.items()}

    wanted = weights(tiny_model(tie_word_embeddings=tied), tmp_path / "one")
    with simulated_mps(monkeypatch):
        model = _spread(tiny_model(tie_word_embeddings=tied))
        assert {p.device for p in model.parameters()} == {CPU, MPS}
        found = weights(model, tmp_path / "two")
    # The norm of all gradients is summed device by device.
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    assert "on 2 devices: a row goes through them in turn" in capsys.readouterr().out


@pytest.mark.slow
# One of the devices is called cpu here, which transformers takes for offloaded.
@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
def test_it_is_resumed_merged_and_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {
        "kernel_impl": "torch", "save_steps": 1, "max_tokens_per_microstep": 60,
        "lr_scheduler_type": "constant", "gradient_checkpointing": False,
    }  # fmt: skip
    whole = train_words(tiny_model(), tmp_path / "one", max_steps=3, **options)
    whole.merge(tmp_path / "one merged")
    answers = whole.generate(["w5 w6"], 8)
    with simulated_mps(monkeypatch):
        for steps in (2, 3):
            AcceleratorState._reset_state(reset_partial_state=True)
            result = train_words(_spread(tiny_model()), tmp_path / "two", max_steps=steps,
                                 resume=steps == 3, **options)  # fmt: skip
        assert result.generate(["w5 w6"], 8) == answers
        assert [pair.won for pair in result.judge(["w5 w6"], judge=lambda p, a: len(a))] == [
            pair.won for pair in whole.judge(["w5 w6"], judge=lambda p, a: len(a))
        ]
        result.merge(tmp_path / "two merged")
    own = load_file(tmp_path / "two merged" / "model.safetensors")
    for name, weight in load_file(tmp_path / "one merged" / "model.safetensors").items():
        torch.testing.assert_close(own[name], weight, rtol=0, atol=1e-6)


def test_what_cannot_be_put_together_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    apart = tiny_model(tie_word_embeddings=False)
    apart.lm_head.to("meta")
    with pytest.raises(UnsupportedModelError, match="offloaded to memory or disk"):
        refuse_parts(apart)
    with simulated_mps(monkeypatch):
        moved = tiny_model(tie_word_embeddings=False)
        moved.lm_head.to("mps")  # by hand: nothing carries a row there
        with pytest.raises(UnsupportedModelError, match=r"on 2 devices .* device_map='auto'"):
            refuse_parts(moved)
        monkeypatch.setattr(Group, "current", staticmethod(lambda: Group(0, 2)))
        with pytest.raises(ValueError, match="several processes share every step: one or the"):
            refuse_parts(_spread(tiny_model()))


def test_rows_are_scored_where_the_head_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with simulated_mps(monkeypatch):
        assert backbone.device_of(_spread(tiny_model(tie_word_embeddings=True))) == CPU
        model = _spread(tiny_model(tie_word_embeddings=False))
        assert backbone.is_spread(model)
        assert backbone.device_of(model) == MPS
        assert backbone.devices_of(model) == [CPU, MPS]
