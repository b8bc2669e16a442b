from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from rmipo_lite.model import batch
from rmipo_lite.tokens.pair import TokenizedPair

PAIR = TokenizedPair(row=0, prompt_ids=[1, 5, 6], chosen_ids=[7, 8, 2], rejected_ids=[9, 2])


def test_packed_row_by_hand() -> None:
    """[1 5 6 | 7 8 | 9]: the last token of a response is fed to nobody, the prompt stands once."""
    inputs = batch.policy_input([PAIR], packing=True)
    assert inputs.input_ids.tolist() == [[1, 5, 6, 7, 8, 9]]
    assert inputs.position_ids.tolist() == [[0, 1, 2, 3, 4, 3]]
    # The prompt's last token (row 2) predicts the first token of both responses.
    assert inputs.logit_rows.tolist() == [2, 3, 4, 2, 5]
    assert inputs.target_ids.tolist() == [7, 8, 2, 9, 2]
    assert inputs.cu_seqlens.tolist() == [0, 3, 5]
    assert inputs.plan.segments == (batch.Segment(0, 5, 0, 0), batch.Segment(5, 6, 0, 3))


def test_padded_rows_by_hand() -> None:
    inputs = batch.policy_input([PAIR], packing=False, pad_id=0)
    assert inputs.input_ids.tolist() == [[1, 5, 6, 7, 8], [1, 5, 6, 9, 0]]
    assert inputs.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert inputs.logit_rows.tolist() == [2, 3, 4, 7, 8]
    assert inputs.target_ids.tolist() == [7, 8, 2, 9, 2]


@pytest.mark.parametrize("packing", [True, False])
def test_prior_scores_from_the_second_token(packing: bool) -> None:
    inputs = batch.prior_input([PAIR], packing)
    assert inputs.target_ids.tolist() == [8, 2, 2]
    assert inputs.cu_seqlens.tolist() == [0, 2, 3]
    fed = inputs.input_ids.flatten()[inputs.logit_rows]
    assert fed.tolist() == [7, 8, 9]


@pytest.mark.parametrize("packing", [True, False])
def test_prior_with_bos_scores_every_token(packing: bool) -> None:
    inputs = batch.prior_input([PAIR], packing, front=[1])
    assert inputs.target_ids.tolist() == [7, 8, 2, 9, 2]
    assert inputs.input_ids.flatten()[inputs.logit_rows].tolist() == [1, 7, 8, 1, 9]


@pytest.mark.parametrize("packing", [True, False])
def test_one_token_response_has_an_empty_prior(packing: bool) -> None:
    pair = TokenizedPair(0, [1, 5], [7], [8])
    inputs = batch.prior_input([pair], packing)
    assert inputs.cu_seqlens.tolist() == [0, 0, 0]
    assert len(inputs.target_ids) == 0
    assert batch.scored_lengths(pair) == (1, 1)


def test_empty_prompt_scores_from_the_second_token() -> None:
    inputs = batch.policy_input([TokenizedPair(0, [], [7, 8], [9, 4, 5])], packing=True)
    assert inputs.target_ids.tolist() == [8, 4, 5]
    assert inputs.input_ids[0][inputs.logit_rows].tolist() == [7, 9, 4]


def test_packing_refuses_two_prompts() -> None:
    pair = TokenizedPair(3, [1, 5], [7], [8], rejected_prompt_ids=[1, 6])
    with pytest.raises(ValueError, match="row 3 has one prompt for the chosen and another"):
        batch.policy_input([pair], packing=True)
    assert batch.policy_input([pair], packing=False).input_ids.tolist() == [[1, 5], [1, 6]]


@pytest.mark.parametrize("packing", [True, False])
def test_split_keeps_every_pair_and_the_budget(packing: bool) -> None:
    pairs = [TokenizedPair(i, [1] * 4, [2] * (i + 1), [3] * 2) for i in range(8)]
    budget = 30
    parts = batch.split_by_budget(pairs, budget, packing)
    assert sorted(pair.row for part in parts for pair in part) == list(range(8))
    # similar lengths meet, the longest first; inside a micro-step the order is the caller's
    for earlier, later in pairwise(parts):
        shortest = min(len(pair.chosen_ids) for pair in earlier)
        assert max(len(pair.chosen_ids) for pair in later) <= shortest
    assert all(part == sorted(part, key=lambda pair: pair.row) for part in parts)
    assert 1 < len(parts) < 8
    for part in parts:
        assert batch.policy_input(part, packing).num_tokens <= budget


def test_split_gives_a_long_pair_its_own_micro_step() -> None:
    long = TokenizedPair(1, [1] * 90, [2] * 9, [3] * 9)
    parts = batch.split_by_budget([PAIR, long, PAIR], 20, packing=True)
    assert [len(part) for part in parts] == [1, 2]


def test_moving_keeps_every_field() -> None:
    inputs = batch.policy_input([PAIR], packing=True)
    moved = inputs.to(torch.device("cpu"))
    assert moved.plan is inputs.plan
    assert torch.equal(moved.input_ids, inputs.input_ids)
