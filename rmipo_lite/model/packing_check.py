"""Before a run: does this model compute on packed rows, and in our head, what it computes itself?

Attention variants that ignore or misread the segment plan are silently wrong, not errors, and no
list of model names stays complete. So two small pairs of the run's own data go through the model
three ways: packed, padded, and with the model's own logits.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from rmipo_lite.adapters.base_model import causal_lm
from rmipo_lite.model import batch
from rmipo_lite.model.attention import packed_attention
from rmipo_lite.model.backbone import UnsupportedModelError, device_of, evaluating, scored_hidden
from rmipo_lite.model.batch import ModelInput
from rmipo_lite.model.head import read_head
from rmipo_lite.ops.native import Impl
from rmipo_lite.tokens.pair import TokenizedPair

# Largest difference of a token's log-prob, nats, that rounding explains. The faults this looks for
# are 0.005 (one misread position) to 0.9 in fp32; in half precision the two forms differ by
# rounding alone by a few hundredths, so there the mean over the tokens is what tells.
_FULL_TOLERANCE = 1e-3
_HALF_MEAN_TOLERANCE = 0.03

_HEAD_TOKENS = 8  # of a sequence, whose logits are compared
_MAX_TOKENS = 256  # of a side: the check stays a fraction of a step


def packing_problem(
    model: nn.Module, pairs: Sequence[TokenizedPair], impl: Impl, pad_id: int
) -> str | None:
    """Why packed rows can't be used with this model, or None where they agree with padded ones.

    Raises:
        UnsupportedModelError: even padded, our head disagrees with the model's own logits.
    """
    sample = _sample(pairs)
    with evaluating(model), torch.no_grad():
        padded_input = batch.policy_input(sample, packing=False, pad_id=pad_id)
        padded = _token_logps(model, padded_input, impl)
        _check_head(model, padded_input, padded)
        if any(pair.rejected_prompt_ids is not None for pair in sample):
            return "the two sides of a pair have different prompts"
        try:
            with packed_attention(model):
                packed = _token_logps(model, batch.policy_input(sample, packing=True), impl)
        except (TypeError, ValueError, RuntimeError, KeyError, AttributeError) as error:
            # Any error of a model that can't read packed rows means the same: pad instead.
            return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    difference = _difference(model, packed, padded)
    if difference is None:
        return None
    return f"token log-probs differ from the padded ones by {difference:.3g} nats"


def _sample(pairs: Sequence[TokenizedPair]) -> list[TokenizedPair]:
    """The shortest pair that has something to get wrong, and the median one, cut short."""
    by_length = sorted(pairs, key=batch.packed_length)
    chosen = [by_length[0], by_length[len(by_length) // 2]]
    return [
        replace(
            pair,
            prompt_ids=pair.prompt_ids[-_MAX_TOKENS:],
            chosen_ids=pair.chosen_ids[:_MAX_TOKENS],
            rejected_ids=pair.rejected_ids[:_MAX_TOKENS],
        )
        for pair in chosen
    ]


def _token_logps(model: nn.Module, inputs: ModelInput, impl: Impl) -> Tensor:
    inputs = inputs.to(device_of(model))
    hidden = scored_hidden(model, inputs)
    return read_head(model).token_logps(hidden, inputs.target_ids, impl).double().cpu()


def _check_head(model: nn.Module, inputs: ModelInput, ours: Tensor) -> None:
    """The padded log-probs against the model's own logits, of the first tokens of every sequence.

    Of a few alone: logits of whole sequences would be more than a run ever holds.
    """
    inputs = inputs.to(device_of(model))
    firsts = [
        place
        for start, end in pairwise(inputs.cu_seqlens.tolist())
        for place in range(start, min(start + _HEAD_TOKENS, end))
    ]
    width = inputs.input_ids.shape[1]
    places = inputs.logit_rows[firsts]
    rows, columns = places // width, places % width
    kept, at = columns.unique(return_inverse=True)
    logits = model(
        input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, use_cache=False,
        logits_to_keep=kept,
    ).logits  # fmt: skip
    logps = logits[rows, at].float().log_softmax(-1)
    theirs = logps.gather(1, inputs.target_ids[firsts, None])[:, 0].double().cpu()
    ours = ours[firsts]
    difference = _difference(model, ours, theirs)
    if difference is not None:
        raise UnsupportedModelError(
            f"model: {type(causal_lm(model)).__name__} turns hidden states into logits in a way "
            f"that is not read here (log-probs differ by {difference:.3g} nats), so it can't be "
            "trained"
        )


def _difference(model: nn.Module, a: Tensor, b: Tensor) -> float | None:
    """The difference in nats where it is more than rounding, else None. NaN is a difference."""
    error = (a - b).abs()
    half = read_head(model).weight.dtype in (torch.bfloat16, torch.float16)
    value = float(error.mean() if half else error.max())
    limit = _HALF_MEAN_TOLERANCE if half else _FULL_TOLERANCE
    return None if value <= limit else value
