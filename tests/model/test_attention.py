"""Packed = padded, for every architecture that the design names, and the way out for the others."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from rmipo_lite.config import RMiPOConfig
from rmipo_lite.model import batch
from rmipo_lite.model.attention import ATTENTION_NAME, packed_attention
from rmipo_lite.model.packing_check import packing_problem
from rmipo_lite.step.pair_step import PairStep
from tests.kit import ARCHITECTURES, VOCAB, random_pairs, tiny_model


def _run(model: nn.Module, packing: bool, tmp_path) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Mean log-probs of both sides (2P,) and every gradient of a step."""
    step = PairStep(model, RMiPOConfig(str(tmp_path)), max_tokens=40, packing=packing)
    model.zero_grad()
    outcome = step.train(random_pairs(), lambda loss: loss.backward())
    assert not outcome.dropped
    logps = torch.cat([torch.cat([v.chosen_logps, v.rejected_logps]) for v in outcome.values])
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return torch.sort(logps).values, gradients


def _assert_same(model: nn.Module, tmp_path) -> None:
    padded_logps, padded_gradients = _run(model, packing=False, tmp_path=tmp_path)
    packed_logps, packed_gradients = _run(model, packing=True, tmp_path=tmp_path)
    torch.testing.assert_close(packed_logps, padded_logps, atol=1e-5, rtol=0)
    assert packed_gradients.keys() == padded_gradients.keys()
    assert packed_gradients
    norm = torch.stack([g.norm() for g in padded_gradients.values()]).norm()
    difference = torch.stack(
        [(packed_gradients[n] - g).norm() for n, g in padded_gradients.items()]
    ).norm()
    assert difference <= 1e-5 * norm


def _with_lora(model: nn.Module) -> nn.Module:
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(model, config)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_equals_padded(name: str, tmp_path) -> None:
    _assert_same(tiny_model(name), tmp_path)


# Reentrant checkpointing says so when a pass has no gradient, as the prior's; peft says which way
# round gpt2 keeps its weights.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("reentrant", [True, False])
def test_packed_equals_padded_with_lora_and_checkpointing(
    name: str, reentrant: bool, tmp_path
) -> None:
    model = _with_lora(tiny_model(name))
    model.get_base_model().enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    _assert_same(model, tmp_path)


def test_stock_attention_on_a_packed_row_is_wrong(tmp_path) -> None:
    """The trap the self-check is for: without our attention the rows read each other."""
    model = tiny_model("llama")
    inputs = batch.policy_input(random_pairs(), packing=True)
    with torch.no_grad():
        stock = model(input_ids=inputs.input_ids, position_ids=inputs.position_ids).logits
        with packed_attention(model):
            ours = model.model(
                input_ids=inputs.input_ids,
                position_ids=inputs.position_ids,
                segment_plan=inputs.plan,
            )[0]
    assert (stock - model.lm_head(ours)).abs().max() > 0.01


def test_attention_is_put_back_also_after_an_error() -> None:
    model = tiny_model("llama")
    before = model.config._attn_implementation

    def fails() -> None:
        with packed_attention(model):
            assert model.config._attn_implementation == ATTENTION_NAME
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fails()
    assert model.config._attn_implementation == before


def test_a_row_without_plan_is_refused() -> None:
    model = tiny_model("llama")
    with packed_attention(model), pytest.raises(ValueError, match="wants a segment plan"):
        model(input_ids=torch.ones(1, 4, dtype=torch.int64))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_selfcheck_lets_these_pack(name: str) -> None:
    assert packing_problem(tiny_model(name), random_pairs(), "auto", 0) is None


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
        ("mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    ],
)
def test_selfcheck_sends_others_to_the_padded_path(kind: str, options: dict[str, int]) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, vocab_size=VOCAB, **options)
    )
    problem = packing_problem(model, random_pairs(), "auto", 0)
    assert problem is not None
    assert "\n" not in problem
