"""What can't be avoided: the bare matrix products and attention of the same packed tokens.

No norm, rotation, activation, residual, embedding, loss or bookkeeping; results are thrown away,
and inputs and cast weights are made before the clock runs. The products run in the shapes and
chunks that ours run in, on the model's own weights; attention is ours, with its backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rmipo_lite.adapters.base_model import causal_lm
from rmipo_lite.model import batch
from rmipo_lite.model.attention import segment_attention
from rmipo_lite.model.batch import ModelInput
from rmipo_lite.model.head import read_head
from rmipo_lite.ops.head_blocks import Blocks
from rmipo_lite.tokens.pair import TokenizedPair


def head_floor(hidden: Tensor, weight: Tensor, products: int = 2) -> None:
    """The head's two bare products (one for the prior) in the blocks and dtype that ours takes.

    Where ours casts the weight, that is part of the floor: the products can't run without.
    """
    blocks = Blocks.of(hidden, weight)
    hidden, weight = hidden.to(blocks.dtype), weight.to(blocks.dtype)
    buffer = hidden.new_empty(blocks.most_rows * blocks.most_columns)
    out = hidden.new_empty(blocks.most_rows, hidden.shape[1])
    for rows in blocks.row_ranges:
        for columns in blocks.column_ranges:
            shape = (rows.stop - rows.start, columns.stop - columns.start)
            logits = buffer[: shape[0] * shape[1]].view(shape)
            torch.mm(hidden[rows], weight[columns].T, out=logits)
            if products == 2:
                for part in blocks.second_ranges(shape[0]):
                    torch.mm(logits[part], weight[columns], out=out[part])


class StepFloor:
    """The bare work of one step on a LoRA Llama: forward, backward and the prior's forward."""

    def __init__(self, model: nn.Module, pairs: Sequence[TokenizedPair]) -> None:
        self.weight = read_head(model).weight
        dtype = self.weight.dtype
        layers: Any = causal_lm(model).model.layers
        self.linears: list[_Linear] = []
        for layer in layers:
            attention, mlp = layer.self_attn, layer.mlp
            # The first layer reads frozen embeddings: nobody asks for their gradient.
            past_first = layer is not layers[0]
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
                self.linears.append(_Linear(linear, dtype, past_first))
            for linear in (attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj):
                self.linears.append(_Linear(linear, dtype, input_grad=True))
        self.attention = layers[0].self_attn
        self.num_layers = len(layers)
        self.policy = _Inputs(model, batch.policy_input(pairs, packing=True), dtype)
        self.prior = _Inputs(model, batch.prior_input(pairs, packing=True), dtype)

    def __call__(self) -> None:
        """Run it once."""
        self._pass(self.policy, backward=True)
        with torch.no_grad():
            self._pass(self.prior, backward=False)

    def _pass(self, inputs: _Inputs, backward: bool) -> None:
        for linear in self.linears:
            linear(inputs.rows[linear.width], backward)
        for _ in range(self.num_layers):
            out, _ = segment_attention(
                self.attention,
                inputs.qkv[0],
                inputs.qkv[1],
                inputs.qkv[2],
                None,
                scaling=self.attention.scaling,
                segment_plan=inputs.plan,
            )
            if backward:
                torch.autograd.grad(out, inputs.qkv, inputs.grad_out)
        head_floor(inputs.hidden, self.weight, products=2 if backward else 1)


class _Inputs:
    """What the products of one pass read."""

    def __init__(self, model: nn.Module, inputs: ModelInput, dtype: torch.dtype) -> None:
        attention: Any = causal_lm(model).model.layers[0].self_attn
        config, tokens = attention.config, inputs.num_tokens
        widths = {config.hidden_size, config.intermediate_size}
        self.rows = {width: torch.ones(tokens, width, dtype=dtype) for width in widths}
        heads = (config.num_attention_heads, *[config.num_key_value_heads] * 2)
        self.qkv = [
            torch.ones(1, count, tokens, attention.head_dim, dtype=dtype, requires_grad=True)
            for count in heads
        ]
        self.grad_out = torch.ones(1, tokens, heads[0], attention.head_dim, dtype=dtype)
        self.hidden = torch.ones(len(inputs.target_ids), config.hidden_size, dtype=dtype)
        self.plan = inputs.plan


class _Linear:
    """A LoRA layer's products: forward, gradients of A and B, gradient of the input."""

    def __init__(self, linear: Any, dtype: torch.dtype, input_grad: bool) -> None:
        self.weight = linear.base_layer.weight
        self.a, self.b = (
            getattr(linear, name)["default"].weight.detach().to(dtype)
            for name in ("lora_A", "lora_B")
        )
        self.width, self.input_grad = self.weight.shape[1], input_grad

    def __call__(self, x: Tensor, backward: bool) -> None:
        y = torch.mm(x, self.weight.T)
        low = torch.mm(x, self.a.T)
        torch.mm(low, self.b.T)
        if backward:
            grad_low = torch.mm(y, self.b)
            torch.mm(y.T, low)
            torch.mm(grad_low.T, x)
            if self.input_grad:
                torch.mm(y, self.weight)
                torch.mm(grad_low, self.a)
