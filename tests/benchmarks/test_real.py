"""Which pairs the real model's benchmark draws; its contenders are the other benchmarks'."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import real
from rmipo_lite.demo.data import MODEL, PAIRS
from rmipo_lite.tokens.pair import TokenizedPair


def test_pairs_are_of_the_lengths_that_are_named() -> None:
    case = real.Lengths("24 to 40 tokens", 24, 40, 3)
    draws = real._draws(MODEL, PAIRS, case, rounds=4)
    assert [len(drawn) for drawn in draws] == [3] * 4
    rows = [pair.row for drawn in draws for pair in drawn]
    assert len(set(rows)) == len(rows)
    for drawn in draws:
        for pair in drawn:
            sides = [
                len(pair.prompt_ids) + len(ids) for ids in (pair.chosen_ids, pair.rejected_ids)
            ]
            assert min(sides) >= 24
            assert max(sides) < 40
    assert real._draws(MODEL, PAIRS, case, rounds=4) == draws


def test_products_are_counted_as_torch_counts_them() -> None:
    """Of a whole forward and backward pass in plain transformers with frozen weights, padded."""
    pair = TokenizedPair(0, [9] * 6, [5] * 7, [6] * 3)
    config = AutoConfig.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.requires_grad_(False)
    states = model.get_input_embeddings()(torch.full((2, 13), 5)).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=states).logits.sum().backward()
    attention = sum(n for op, n in counter.flop_counts["Global"].items() if "bmm" in str(op))
    theirs = counter.get_total_flops() - attention
    body = sum(w.numel() for w in model.get_decoder().layers.parameters() if w.dim() > 1)
    head = config.vocab_size * config.hidden_size
    assert theirs == 4 * 26 * (body + head)  # forward and backward, two operations a product
    rows = {row.metric + row.impl: row.value for row in real.counted(MODEL, [[pair]], "", "")}
    simpo = 4 * (14 * body + 10 * head) / theirs
    assert rows["products over trl SimPO's, countedours, simpo"] == pytest.approx(simpo, rel=1e-2)
    live = simpo + 2 * 10 * (body + head) / theirs
    assert rows["products over trl SimPO's, countedours"] == pytest.approx(live, rel=1e-2)
