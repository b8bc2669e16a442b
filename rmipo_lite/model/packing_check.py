"""Before a run: does this model compute on packed rows what it computes on padded ones?

Attention variants that ignore or misread the segment plan are silently wrong, not errors, and no
list of model names stays complete. So a few small pairs of the run's own data go through the model
packed and padded, and `head_check` looks at its logits.

Rounding is no fault. Packed and padded rows are read by different kernels, and a deep model in half
precision carries the last bit of a layer on into hundredths of a nat: what it makes of such bits is
measured, and the two forms may differ by half as much again.
"""

import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from rmipo_lite.adapters.base_model import causal_lm
from rmipo_lite.model import batch
from rmipo_lite.model.attention import packed_attention
from rmipo_lite.model.backbone import device_of, evaluating, scored_hidden
from rmipo_lite.model.batch import ModelInput
from rmipo_lite.model.head import ModelHead, read_head
from rmipo_lite.model.head_check import check_head, compute_dtypes
from rmipo_lite.ops.native import Impl
from rmipo_lite.ops.reference import sequence_of_token
from rmipo_lite.tokens.pair import TokenizedPair

# Largest difference of a token's log-prob, nats, that rounding explains. The faults this looks for
# are 0.005 (one misread position) to 0.9 in fp32; in half precision the two forms differ by
# rounding alone by a few hundredths, so there the mean over a side's tokens is what tells.
_FULL_TOLERANCE = 1e-3
_HALF_MEAN_TOLERANCE = 0.03
# A model's own rounding is measured with this share of the embeddings' elements one step off: the
# layers do the rest. Packed rows stay below what it gives (0.7 to 1.0 of it, 2 to 32 layers); a
# position off by one in all of a response, the smallest fault, is 2.1 times it in Gemma 3 270M.
_NUDGED, _NOISE_FACTOR = 0.01, 1.5
_TF32_STEP = 2.0**-10

_MAX_TOKENS = 256  # of a side: the check stays a fraction of a step
_MOST_PADDED = 2048  # tokens of all rows: memory for more may not be there
_ENOUGH_TOKENS = 64  # that are scored: a mean over fewer is itself mostly noise

# What a model raises that can't read packed rows. Not what the machine says, nor a fault of ours.
_CANT = (TypeError, ValueError, RuntimeError, LookupError, AttributeError)
_OF_THE_MACHINE = ("CUDA error", "out of memory", "can't allocate memory")
_TORCH = Path(torch.__file__).parent


def packing_problem(
    model: nn.Module, pairs: Sequence[TokenizedPair], impl: Impl, pad_id: int
) -> str | None:
    """Why packed rows can't be used with this model, or None where they agree with padded ones.

    Raises:
        UnsupportedModelError: even padded, our head disagrees with the model's own logits.
        RuntimeError: the compiled kernels disagree with plain PyTorch on this device.
    """
    sample = sample_of(pairs)
    with evaluating(model), torch.no_grad():
        padded = batch.policy_input(sample, packing=False, pad_id=pad_id).to(device_of(model))
        head, hidden = read_head(model), scored_hidden(model, padded)
        check_head(model, head, padded, hidden, impl)
        if any(pair.rejected_prompt_ids is not None for pair in sample):
            return "the two sides of a pair have different prompts"
        packed = batch.policy_input(sample, packing=True).to(device_of(model))
        try:
            with packed_attention(model):
                packed_hidden = scored_hidden(model, packed)
        except _CANT as error:
            if _is_of_the_machine(error):
                raise
            return _told(error)
        logps = head.token_logps(hidden, padded.target_ids, impl)
        packed_logps = head.token_logps(packed_hidden, padded.target_ids, impl)
        if _is_close(head, padded, packed_logps, logps):
            return None
        nudged = head.token_logps(_nudged_hidden(model, padded), padded.target_ids, impl)
    difference, noise = (_mean(padded, other, logps) for other in (packed_logps, nudged))
    if difference <= _NOISE_FACTOR * noise:
        return None
    return (
        f"token log-probs differ from the padded ones by {difference:.3g} nats "
        f"(its own rounding: {noise:.2g})"
    )


def sample_of(pairs: Sequence[TokenizedPair]) -> list[TokenizedPair]:
    """The shortest pair that has something to get wrong, and median ones, cut short."""
    by_length = sorted(pairs, key=batch.packed_length)
    chosen = [by_length[0]]
    for pair in by_length[len(by_length) // 2 :]:
        chosen.append(pair)
        scored = sum(sum(batch.scored_lengths(pair)) for pair in chosen)
        widest = max(min(batch.packed_length(pair), 2 * _MAX_TOKENS) for pair in chosen)
        if scored >= _ENOUGH_TOKENS or 2 * len(chosen) * widest >= _MOST_PADDED:
            break
    return [batch.cut_short(pair, _MAX_TOKENS) for pair in chosen]


def _is_close(head: ModelHead, inputs: ModelInput, a: Tensor, b: Tensor) -> bool:
    """Whether token log-probs are within what rounding gives in most models. NaN isn't."""
    if head.weight.dtype in (torch.bfloat16, torch.float16):
        return _mean(inputs, a, b) <= _HALF_MEAN_TOLERANCE
    return float((a - b).abs().max()) <= _FULL_TOLERANCE


def _mean(inputs: ModelInput, a: Tensor, b: Tensor) -> float:
    """The mean difference, nats, of the worse side: packed, the two are read in different ways."""
    error = (a - b).abs().cpu().double()  # Apple's GPUs have no float64
    side = sequence_of_token(inputs.cu_seqlens.cpu(), len(error)) % 2
    sums = error.new_zeros(2).index_add_(0, side, error)
    return float((sums / side.bincount(minlength=2).clamp(min=1)).max())


def _rounding_step(model: nn.Module, output: Tensor) -> float:
    """Of the coarsest arithmetic at work, which the embeddings' own need not be."""
    dtypes = {output.dtype, *compute_dtypes(model), *(p.dtype for p in model.parameters())}
    steps = [torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point]
    is_tf32 = output.is_cuda and torch.backends.cuda.matmul.allow_tf32
    return max(*steps, _TF32_STEP if is_tf32 else 0.0)


def _nudged_hidden(model: nn.Module, inputs: ModelInput) -> Tensor:
    """The scored rows again, with a few elements of the embeddings one rounding step off."""
    generator = torch.Generator().manual_seed(0)

    def nudge(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        chosen = torch.rand(output.shape, generator=generator).to(output.device) < _NUDGED
        return torch.where(chosen, output * (1 + _rounding_step(model, output)), output)

    handle = causal_lm(model).get_input_embeddings().register_forward_hook(nudge)
    try:
        return scored_hidden(model, inputs)
    finally:
        handle.remove()


def _is_of_the_machine(error: Exception) -> bool:
    """Whether memory or device failed, by the error's kind or its text."""
    if isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError, RecursionError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OF_THE_MACHINE)


def _told(error: Exception) -> str:
    """Kind, text and place of an error, the place where the model's own code was; one line."""
    frames = traceback.extract_tb(error.__traceback__)
    at = [frame for frame in frames if _TORCH not in Path(frame.filename).parents][-1]
    text = str(error).partition("\n")[0][:120]
    return f"{type(error).__name__}: {text} ({Path(at.filename).name}:{at.lineno} {at.name})"
