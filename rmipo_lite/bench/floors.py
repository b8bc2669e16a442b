"""What can't be avoided: the bare matrix products and attention of the same packed tokens.

No norm, rotation, activation, residual, embedding, loss or bookkeeping; results are thrown away.
Weights are the model's own, and the products run in the shapes and chunks that ours run in.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from rmipo_lite import batch
from rmipo_lite.attention import segment_attention
from rmipo_lite.batch import ModelInput
from rmipo_lite.model import causal_lm, read_head
from rmipo_lite.ops.head_blocks import Blocks
from rmipo_lite.tokenization import TokenizedPair


def head_floor(hidden: Tensor, weight: Tensor, products: int = 2) -> None:
    """The head's two bare products (one for the prior) in the blocks that ours takes."""
    blocks = Blocks.of(hidden, weight)
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
        self.model = model
        self.policy = batch.policy_input(pairs, packing=True)
        self.prior = batch.prior_input(pairs, packing=True)
        self.layers: Any = causal_lm(model).model.layers
        self.weight = read_head(model).weight
        self.dtype = self.weight.dtype

    def __call__(self) -> None:
        """Run it once."""
        self._pass(self.policy, backward=True)
        with torch.no_grad():
            self._pass(self.prior, backward=False)

    def _pass(self, inputs: ModelInput, backward: bool) -> None:
        tokens = inputs.num_tokens
        for layer in self.layers:
            attention, mlp = layer.self_attn, layer.mlp
            # The first layer reads frozen embeddings: nobody asks for their gradient.
            past_first = backward and layer is not self.layers[0]
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
                _linear(linear, tokens, self.dtype, backward, past_first)
            for linear in (attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj):
                _linear(linear, tokens, self.dtype, backward, backward)
            self._attention(attention, inputs, backward)
        scored = len(inputs.target_ids)
        hidden = torch.ones(scored, self.weight.shape[1], dtype=self.dtype)
        head_floor(hidden, self.weight, products=2 if backward else 1)

    def _attention(self, module: Any, inputs: ModelInput, backward: bool) -> None:
        config = module.config
        shape = (1, config.num_attention_heads, inputs.num_tokens, module.head_dim)
        kv_shape = (1, config.num_key_value_heads, inputs.num_tokens, module.head_dim)
        q, k, v = (
            torch.ones(s, dtype=self.dtype, requires_grad=backward)
            for s in (shape, kv_shape, kv_shape)
        )
        context: AbstractContextManager[object] = nullcontext() if backward else torch.no_grad()
        with context:
            out, _ = segment_attention(
                module, q, k, v, None, scaling=module.scaling, segment_plan=inputs.plan
            )
        if backward:
            torch.autograd.grad(out, (q, k, v), torch.ones_like(out))


def _linear(linear: Any, tokens: int, dtype: torch.dtype, backward: bool, input_grad: bool) -> None:
    """A LoRA layer's products: forward, gradients of A and B, gradient of the input."""
    weight = linear.base_layer.weight
    a, b = (
        getattr(linear, name)["default"].weight.detach().to(dtype) for name in ("lora_A", "lora_B")
    )
    x = torch.ones(tokens, weight.shape[1], dtype=dtype)
    y = torch.mm(x, weight.T)
    low = torch.mm(x, a.T)
    torch.mm(low, b.T)
    if backward:
        grad_low = torch.mm(y, b)
        torch.mm(y.T, low)
        torch.mm(grad_low.T, x)
    if input_grad:
        torch.mm(y, weight)
        torch.mm(grad_low, a)
