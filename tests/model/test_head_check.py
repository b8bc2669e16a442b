"""The head before a run: rounding passes, a fault of head, kernels or device doesn't."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from rmipo_lite.adapters.base_model import causal_lm
from rmipo_lite.model import batch, head_check, packing_check
from rmipo_lite.model.backbone import UnsupportedModelError, scored_hidden
from rmipo_lite.model.head import ModelHead
from rmipo_lite.model.packing_check import packing_problem
from rmipo_lite.ops import native
from tests.kit import random_pairs, tiny_model

HALF = (torch.bfloat16, torch.float16)
PAIRS = random_pairs(8, longest=40)


def _problem(model: nn.Module, impl: native.Impl = "torch") -> str | None:
    return packing_problem(model, PAIRS, impl, 0)


def _with_logits(
    largest: float, dtype: torch.dtype, name: str = "llama", **changes: object
) -> nn.Module:
    """A tiny model whose largest product of hidden row and head is about `largest`."""
    model = tiny_model(name, vocab_size=500, **changes)
    inputs = batch.policy_input(PAIRS, packing=False)
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        head *= largest / float((scored_hidden(model, inputs) @ head.T).abs().max())
    return model.to(dtype)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("largest", [9, 22, 43, 100])
@pytest.mark.parametrize("impl", ["torch", "native"])
def test_rounding_of_large_logits_is_no_fault(
    largest: float, dtype: torch.dtype, impl: native.Impl
) -> None:
    assert _problem(_with_logits(largest, dtype), impl) is None


def _changed(change: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, Any], None]:
    """Let the model's logits be something that its config doesn't tell."""

    def plant(model: nn.Module, _monkeypatch: pytest.MonkeyPatch) -> None:
        model.lm_head.register_forward_hook(lambda _module, _args, logits: change(logits))

    return plant


def _wrong_row(_model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (packing_check, head_check):
        monkeypatch.setattr(
            module, "scored_hidden", lambda *args: scored_hidden(*args).roll(1, dims=0)
        )


def _biased(logits: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return logits + torch.randn(logits.shape[-1], generator=generator).to(logits.dtype)


HEAD_FAULTS = {
    "scale": _changed(lambda logits: 1.1 * logits),
    "softcap": _changed(lambda logits: 30 * torch.tanh(logits / 30)),
    "bias": _changed(_biased),
    "narrower": _changed(lambda logits: logits[..., :-1]),
    "not finite": _changed(lambda logits: logits.index_fill(-1, torch.tensor([7]), torch.inf)),
    "row": _wrong_row,
}


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("largest", [9, 43])
@pytest.mark.parametrize("fault", HEAD_FAULTS)
def test_a_fault_of_the_head_is_found(
    fault: str, largest: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _with_logits(largest, dtype)
    HEAD_FAULTS[fault](model, monkeypatch)
    with pytest.raises(UnsupportedModelError, match="logits differ by"):
        _problem(model)


@pytest.mark.parametrize(
    ("dtype", "told"), [(torch.float16, "take bf16=True"), (torch.float32, "weights are damaged")]
)
def test_a_model_that_gives_nan_by_itself_is_told_so(dtype: torch.dtype, told: str) -> None:
    model = _with_logits(9, dtype)
    model.model.layers[0].mlp.down_proj.weight.data.fill_(torch.inf)
    with pytest.raises(UnsupportedModelError, match=f"itself gives NaN .* in {dtype}: .*{told}"):
        _problem(model)


def _lora_on_head(largest: float, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "lm_head"])
    return get_peft_model(_with_logits(largest, dtype), config).eval()


def _float32_logits(largest: float, dtype: torch.dtype) -> nn.Module:
    model = _with_logits(largest, dtype)
    model.lm_head.register_forward_hook(lambda _module, _args, logits: logits.float())
    return model


def _with_bias(largest: float, dtype: torch.dtype) -> nn.Module:
    model = _with_logits(largest, torch.float32)
    model.lm_head.bias = nn.Parameter(torch.linspace(-3, 3, 500))
    return model.to(dtype)


def _four_bit(largest: float, dtype: torch.dtype) -> nn.Module:
    """A head that multiplies in `dtype` under a float32 model."""
    bnb = pytest.importorskip("bitsandbytes")
    model = _with_logits(largest, torch.float32)
    weight = model.lm_head.weight.detach()
    head = bnb.nn.Linear4bit(32, len(weight), bias=False, compute_dtype=dtype, quant_type="nf4")
    head.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    head.support_avx512bf16_for_cpu = False
    model.lm_head = head.to("cpu")
    return model


HEADS: dict[str, Callable[[float, torch.dtype], nn.Module]] = {
    "softcap": functools.partial(_with_logits, name="gemma2"),
    "divides": functools.partial(_with_logits, name="granite", logits_scaling=0.7),
    "tied": functools.partial(_with_logits, tie_word_embeddings=True),
    "bias": _with_bias,
    "LoRA": _lora_on_head,
    "float32 logits": _float32_logits,
    "4-bit": _four_bit,
}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("largest", [9, 100])
@pytest.mark.parametrize("head", HEADS)
def test_each_kind_of_head_may_round(head: str, largest: float, dtype: torch.dtype) -> None:
    assert _problem(HEADS[head](largest, dtype), "native") is None


@pytest.mark.parametrize("head", ["softcap", "divides", "LoRA"])
def test_a_fault_under_each_kind_of_head_is_found(head: str) -> None:
    model = HEADS[head](22, torch.bfloat16)
    layer = causal_lm(model).get_output_embeddings()
    layer.register_forward_hook(lambda _module, _args, logits: 1.1 * logits)
    with pytest.raises(UnsupportedModelError, match="logits differ by"):
        _problem(model)


def test_a_head_of_zeros_is_no_fault() -> None:
    model = tiny_model()
    nn.init.zeros_(model.lm_head.weight)
    assert _problem(model) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("error", [0.2, torch.nan])
def test_broken_kernels_are_found(
    error: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = ModelHead.token_logps

    def wrong(head: ModelHead, hidden: Tensor, ids: Tensor, impl: native.Impl) -> Tensor:
        return right(head, hidden, ids, impl) - (error if impl == "native" else 0)

    monkeypatch.setattr(ModelHead, "token_logps", wrong)
    with pytest.raises(RuntimeError, match=f"log-probs are {error} nats and .* off plain"):
        _problem(tiny_model().to(dtype), "native")
    assert _problem(tiny_model().to(dtype), "torch") is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_kernels_of_a_wrong_gradient_are_found(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = ModelHead.token_logps

    def wrong(head: ModelHead, hidden: Tensor, ids: Tensor, impl: native.Impl) -> Tensor:
        if impl != "native":
            return right(head, hidden, ids, impl)
        return right(head, 0.9 * hidden + 0.1 * hidden.detach(), ids, impl)  # the same values

    monkeypatch.setattr(ModelHead, "token_logps", wrong)
    with pytest.raises(RuntimeError, match=r"gradients (9\.|10\.)\d+% off plain"):
        _problem(tiny_model().to(dtype), "native")
