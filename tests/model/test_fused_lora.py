"""LoRA in fewer passes: peft's own forward is what it must equal, and what is left of it after."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from rmipo_lite.model.fused_lora import fused_lora, is_plain
from tests.kit import tiny_model


def _model(
    dtype: torch.dtype = torch.float32, compute: torch.dtype | None = None, **options: object
) -> nn.Module:
    """A tiny model with an adapter; in 4 bits where `compute` says what those multiply in."""
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "init_lora_weights": False}
        | options
    )
    base = tiny_model().to(dtype)
    if compute is not None:
        _quantise(base, compute)
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return model.train()


def _quantise(base: Any, compute: torch.dtype) -> None:
    for block in base.model.layers:
        for part in (block.self_attn, block.mlp):
            for name, old in list(part.named_children()):
                if type(old) is not nn.Linear:
                    continue
                new = bnb.nn.Linear4bit(
                    old.in_features, old.out_features, bias=False, compute_dtype=compute
                )
                new.weight = bnb.nn.Params4bit(old.weight.data, False, quant_type="nf4")
                setattr(part, name, new.to("cpu"))  # which quantises
    base.is_loaded_in_4bit = True  # peft asks


def _gradients(model: nn.Module, bf16: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    torch.manual_seed(1)
    ids = torch.randint(3, 90, (2, 11))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(input_ids=ids).logits
    logits.float().pow(2).mean().backward()
    return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"target_modules": ["v_proj"]}, {"compute": torch.float32}],
    ids=str,
)
def test_equals_peft(options: dict, checkpointing: bool) -> None:
    model = _model(**options)
    if checkpointing:
        model.get_base_model().enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    logits, wanted = _gradients(model, bf16=False)
    with fused_lora(model):
        assert any("forward" in module.__dict__ for module in model.modules())
        ours, gradients = _gradients(model, bf16=False)
    torch.testing.assert_close(ours, logits, atol=1e-5, rtol=1e-5)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        scale = wanted[name].abs().max()
        assert scale > 0, name
        assert (gradient - wanted[name]).abs().max() <= 1e-5 * scale, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("compute", [None, torch.bfloat16, torch.float32])
def test_under_autocast_it_is_as_close_to_fp32_as_peft(
    dtype: torch.dtype, compute: torch.dtype | None
) -> None:
    torch.manual_seed(0)
    model = _model(dtype, compute)
    torch.manual_seed(0)
    exact = _model(dtype, compute and torch.float32).float()
    truth = _gradients(exact, bf16=False)[1]
    theirs = _gradients(model, bf16=True)[1]
    with fused_lora(model):
        ours = _gradients(model, bf16=True)[1]

    def error(gradients: dict[str, torch.Tensor]) -> float:
        return sum(float((gradients[n] - truth[n]).norm() / truth[n].norm()) for n in truth)

    assert ours.keys() == truth.keys()
    assert all(gradient.dtype == torch.float32 for gradient in ours.values())
    assert error(ours) < 1.25 * error(theirs)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("compute", [None, torch.bfloat16, torch.float32])
def test_one_layer_with_the_gradient_of_its_input(
    dtype: torch.dtype, compute: torch.dtype | None, autocast: bool
) -> None:
    """What is asked in one precision is answered in the one that peft answers in."""
    layer = _model(dtype, compute, target_modules=["v_proj"]).model.model.layers[0].self_attn.v_proj
    x = torch.randn(2, 5, 32, dtype=dtype)

    def passed() -> list[torch.Tensor]:
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = layer(leaf)
        out.float().square().sum().backward()
        low, high = layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad
        return [out.detach(), leaf.grad, low, high]

    wanted = passed()
    with fused_lora(layer):
        ours = passed()
    for value, other in zip(ours, wanted, strict=True):
        assert value.dtype == other.dtype
        exact = not autocast
        error = (value.float() - other.float()).norm() / other.float().norm()
        assert error <= (1e-6 if exact else 0.02)


def test_the_adapter_keeps_its_precision_where_peft_computes_in_it() -> None:
    """bf16 weights, fp32 adapter and no autocast: peft's own rules apply, to the bit."""
    model = _model(torch.bfloat16)
    wanted = _gradients(model, bf16=False)
    with fused_lora(model):
        ours = _gradients(model, bf16=False)
    assert torch.equal(ours[0], wanted[0])
    assert all(torch.equal(ours[1][name], value) for name, value in wanted[1].items())


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_dropout": 0.1}])
@pytest.mark.parametrize("compute", [None, torch.float32])
def test_other_kinds_are_left_to_peft(options: dict, compute: torch.dtype | None) -> None:
    assert not any(is_plain(m) for m in _model(compute=compute, **options).modules())


@pytest.mark.parametrize("where", ["base_layer", "lora_A"])
def test_hooks_are_honoured_by_leaving_the_layer_to_peft(where: str) -> None:
    model = _model(target_modules=["v_proj"])
    layers = [module for module in model.modules() if is_plain(module)]
    assert len(layers) == 2
    module = getattr(layers[1], where)  # the first one reads embeddings without a gradient
    module = module["default"] if where == "lora_A" else module
    seen = []
    module.register_full_backward_hook(lambda *args: seen.append(1))
    with fused_lora(model):
        _gradients(model, bf16=False)
    assert seen
    assert [is_plain(layer) for layer in layers] == [True, False]


@pytest.mark.filterwarnings("ignore:.*erge lora module to 4-bit linear")
@pytest.mark.parametrize("compute", [None, torch.float32])
def test_a_disabled_merged_or_second_adapter_is_left_to_peft(compute: torch.dtype | None) -> None:
    model = _model(compute=compute)
    assert any(is_plain(module) for module in model.modules())
    with model.disable_adapter():
        assert not any(is_plain(module) for module in model.modules())
    model.merge_adapter()
    assert not any(is_plain(module) for module in model.modules())
    model.unmerge_adapter()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["v_proj"]))
    model.base_model.set_adapter(["default", "second"])
    assert not any(is_plain(m) for n, m in model.named_modules() if n.endswith("v_proj"))


def test_the_layers_are_as_before_also_after_an_error() -> None:
    model = _model()

    def fails() -> None:
        with fused_lora(model):
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fails()
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("compute", [None, torch.bfloat16])
def test_what_is_kept_for_backward_is_shared(compute: torch.dtype | None) -> None:
    """Under autocast peft keeps two casts of its input for every layer."""
    model = _model(torch.bfloat16, compute)

    def kept_bytes() -> int:
        kept: dict[int, torch.Tensor] = {}
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in weights:
                kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        ids = torch.randint(3, 90, (2, 60))
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with torch.autocast("cpu", torch.bfloat16), hooks:
            model.get_base_model().model(input_ids=ids)
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

    theirs = kept_bytes()
    with fused_lora(model):
        ours = kept_bytes()
    assert ours < 0.9 * theirs
