"""Layers in liger-kernel's kernels: chosen by what they compute, put back, and its own kernels too.

Stand-ins of torch take the kernels' place, but for one test, which runs the real ones on the CPU in
Triton's interpreter where both packages are installed.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import types
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rmipo_lite.adapters.attach import attach_adapter
from rmipo_lite.config import RMiPOConfig
from rmipo_lite.model import batch
from rmipo_lite.model.backbone import scored_hidden
from rmipo_lite.step import fused_layers, make
from rmipo_lite.step.fused_layers import find_fused
from rmipo_lite.step.pair_step import PairStep
from tests.conftest import ROOT
from tests.kit import random_pairs, tiny_model, word_tokenizer


class _Norm:
    """What LigerRMSNormFunction computes."""

    @staticmethod
    def apply(
        x: Any, weight: Any, eps: float, offset: float, casting: str, in_place: bool
    ) -> torch.Tensor:
        assert not in_place
        y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
        if casting == "llama":
            return (offset + weight) * y.to(x.dtype)
        return ((offset + weight.float()) * y).to(x.dtype)


def _gate(activation: Any) -> Any:
    return types.SimpleNamespace(apply=lambda a, b: activation(a) * b)


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The functions that are taken, which a test may change."""
    found: dict[str, Any] = {
        "norm": _Norm,
        "silu": _gate(nn.functional.silu),
        "gelu": _gate(lambda a: nn.functional.gelu(a, approximate="tanh")),
    }
    monkeypatch.setattr(fused_layers, "_is_available", lambda device: True)
    monkeypatch.setattr(fused_layers, "_functions", lambda: tuple(found.values()))
    return found


def _found(model: nn.Module, pairs: int = 3) -> Any:
    inputs = batch.policy_input(random_pairs(pairs), packing=False)
    return find_fused(model, torch.device("cpu"), lambda: scored_hidden(model, inputs))


def _gradients(
    model: nn.Module, tmp_path: Path, layers: Any, pairs: int = 6
) -> dict[str, torch.Tensor]:
    model.zero_grad()
    args = RMiPOConfig(str(tmp_path), use_cpu=True)
    step = PairStep(model, args, 40, True, fused_layers=layers)
    step.train(random_pairs(pairs), lambda loss: loss.backward())
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("kind", "count"), [("llama", 7), ("gemma2", 11), ("qwen3", 11)], ids=lambda value: str(value)
)
@pytest.mark.parametrize("adapter", [False, True])
def test_a_step_is_the_same(
    kind: str, count: int, adapter: bool, liger: Any, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model = tiny_model(kind).train()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.add_(0.3 * torch.randn_like(weight))
    model = attach_adapter(model, "new") if adapter else model
    layers = _found(model)
    assert len(layers) == count
    assert (
        f"{count} norms and gated units run in liger-kernel's kernels\n" in capsys.readouterr().out
    )
    wanted, ours = (_gradients(model, tmp_path, some) for some in ((), layers))
    assert wanted.keys() == ours.keys()
    for name, gradient in ours.items():
        assert (gradient - wanted[name]).norm() <= 1e-5 * wanted[name].norm(), name
    assert not any("forward" in vars(module) for module in model.modules())


def test_bf16_is_compared_up_to_its_rounding(liger: Any) -> None:
    assert len(_found(tiny_model("gemma2").to(torch.bfloat16))) == 11


def test_a_layer_that_differs_stays_and_is_named(
    liger: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One whose forward is another one, one with a wrong gradient, one whose kernel raises."""

    class ScaledRMSNorm(type(tiny_model().model.norm)):  # type: ignore[misc]
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return 1.001 * super().forward(hidden_states)

    class _Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(a, b)
            return nn.functional.silu(a) * b

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> Any:
            a, b = ctx.saved_tensors
            return grad * b, grad * nn.functional.silu(a)

    def fail(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no kernel image\nis available")

    model = tiny_model()
    model.model.norm.__class__ = ScaledRMSNorm
    liger["silu"], liger["gelu"] = _Wrong, types.SimpleNamespace(apply=fail)
    layers = _found(model)
    told = capsys.readouterr().out
    assert len(layers) == 4
    assert "1 ScaledRMSNorm (values differ by 0.001)" in told
    assert "2 LlamaMLP (gradients differ by" in told
    assert all(module is not model.model.norm for module, _ in layers)


def test_what_somebody_changed_is_left_alone(liger: Any) -> None:
    model = tiny_model()
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    model.model.layers[1].mlp.act_fn.register_forward_hook(lambda *_: None)
    model.model.norm.forward = model.model.norm.forward
    assert len(_found(model)) == 4


def test_what_somebody_changes_later_is_left_alone_too(liger: Any) -> None:
    model, calls = tiny_model(), []
    layers = _found(model)
    norm, gated = model.model.norm, model.model.layers[0].mlp
    own = norm.forward = lambda x: type(norm).forward(norm, x)
    gated.act_fn.register_forward_hook(lambda *_: calls.append(1))
    with fused_layers.replaced(layers):
        assert sum("forward" in vars(module) for module, _ in layers) == 6
        assert norm.forward is own
        _found(model)
    assert calls
    assert norm.forward is own
    assert "forward" not in vars(gated)


@pytest.mark.parametrize(
    "source",
    [
        "gate = self.act_fn(self.gate_proj(x)).clamp(max=10)\n"
        "return self.down_proj(gate * self.up_proj(x))",
        "return 2 * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))",
        "down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))\n"
        "return nn.functional.dropout(down_proj, 0.1, self.training)",
    ],
)
def test_gated_units_that_do_more_are_left_alone(source: str, liger: Any, tmp_path: Path) -> None:
    """As Step 3.5's, FalconH1's and Seed-OSS': a few inputs in evaluation mode don't show it."""
    body = "\n".join(f"        {line}" for line in source.splitlines())
    file = tmp_path / "other_mlp.py"
    file.write_text(f"from torch import nn\nclass Other:\n    def forward(self, x):\n{body}\n")
    spec = importlib.util.spec_from_file_location("other_mlp", file)
    assert spec is not None
    other = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(other)  # type: ignore[union-attr]
    model = tiny_model()
    for layer in model.model.layers:
        layer.mlp.__class__ = type("Other", (other.Other, type(layer.mlp)), {})
    assert len(_found(model)) == 5


def test_what_could_not_be_compared_is_left_alone(
    liger: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beyond a layer that gives no numbers nothing is: equal is what was seen to be equal."""
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(torch.nan)
    found = [module for module, _ in _found(model)]
    first, last = model.model.layers
    assert first.input_layernorm in found
    assert not {first.mlp, last.input_layernorm, last.mlp, model.model.norm} & set(found)
    assert "its input isn't finite" in capsys.readouterr().out


def test_an_epsilon_of_another_kind_shows_in_small_inputs(liger: Any) -> None:
    """Added to the root rather than below it: alike on inputs of ordinary size."""

    class OtherRMSNorm(type(tiny_model().model.norm)):  # type: ignore[misc]
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            root = hidden_states.pow(2).mean(-1, keepdim=True).sqrt()
            return self.weight * hidden_states / (root + self.variance_epsilon)

    model = tiny_model()
    model.model.norm.__class__ = OtherRMSNorm
    assert all(module is not model.model.norm for module, _ in _found(model))


def test_the_option_and_the_machine_decide(
    liger: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, pairs = tiny_model(), random_pairs(4)

    def layers(**options: Any) -> int:
        args = RMiPOConfig(str(tmp_path), use_cpu=True, **options)
        return len(make.make_step(model, args, pairs, tokenizer=word_tokenizer()).fused_layers)

    assert (layers(), layers(fused_layers="off")) == (7, 0)
    monkeypatch.setattr(fused_layers, "_is_available", lambda device: False)
    assert layers() == 0


@pytest.mark.parametrize(
    ("there", "device", "interpreted", "wanted", "told"),
    [
        ("0.8.5", "cpu", "1", True, ""),
        ("0.8.5", "cpu", "", False, ""),
        ("0.8.5", "mps", "1", False, ""),
        ("0.4.2", "cpu", "1", False, "liger-kernel 0.4.2 is not used: 0.5 to 0.8 are known"),
        ("1.0", "cpu", "1", False, "liger-kernel 1.0 is not used"),
    ],
)
def test_where_it_is_to_be_had(
    there: str, device: str, interpreted: str, wanted: bool, told: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(fused_layers, "find_spec", lambda name: object())
    monkeypatch.setattr(fused_layers, "version", lambda name: there)
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    assert fused_layers._is_available(torch.device(device)) is wanted
    assert capsys.readouterr().out.startswith(told)


_REAL = """
import triton.language as tl, triton.runtime.interpreter as interpreter
import liger_kernel.ops.geglu as geglu, liger_kernel.ops.rms_norm as rms_norm

class Scalar(float):  # which a compiled kernel's is; and the device's own functions
    def to(self, *_): return self

own = interpreter._implicit_cvt
interpreter._implicit_cvt = lambda a: Scalar(a) if isinstance(a, float) else own(a)
rms_norm.rsqrt = lambda x: 1.0 / tl.sqrt(x, _semantic=interpreter.interpreter_semantic)
geglu.tanh = lambda x: 2 * tl.sigmoid(2 * x) - 1
from pathlib import Path
from tests.step.test_fused_layers import _found, _gradients, tiny_model
for kind, count in (("llama", 4), ("gemma2", 6)):
    model = tiny_model(kind, num_hidden_layers=1).train()
    layers = _found(model, 1)
    assert len(layers) == count, layers
    wanted, ours = (_gradients(model, Path("x"), some, 1) for some in ((), layers))
    for name, gradient in ours.items():
        assert (gradient - wanted[name]).norm() <= 1e-5 * wanted[name].norm(), name
"""


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("triton") is None or find_spec("liger_kernel") is None,
    reason="triton or liger-kernel isn't installed",
)
def test_its_own_kernels(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _REAL], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "as they are" not in done.stdout
