"""Before a run: does this model compute on packed rows, and in our head, what it computes itself?

Attention variants that ignore or misread the segment plan are silently wrong, not errors, and no
list of model names stays complete. So a few small pairs of the run's own data go through the model
packed and padded; and some of the logits the model itself makes are laid beside ours.

Neither may be refused for its rounding. Logits are compared before the softmax, each against its
own size, which is what its rounding goes by. Packed and padded rows are read by different kernels,
and a deep model in half precision carries the last bit of a layer on into hundredths of a nat: what
it makes of such bits is measured, and the two forms may differ by half as much again.
"""

import traceback
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from rmipo_lite.adapters.base_model import causal_lm
from rmipo_lite.model import batch
from rmipo_lite.model.attention import packed_attention
from rmipo_lite.model.backbone import UnsupportedModelError, device_of, evaluating, scored_hidden
from rmipo_lite.model.batch import ModelInput
from rmipo_lite.model.head import ModelHead, read_head
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

# Of a logit and the root mean square of its row. Three roundings lie between the model's and ours
# at most: of the product, of LoRA's sum (or of the scale), of the softcap; together two steps.
_LOGIT_TOLERANCE, _LOGIT_STEPS = 1e-4, 2
_LEAST_LOGIT = 1e-3  # what is smaller changes no probability

# Of the kernels' gradients and the largest of them: a 16-bit derivative is rounded, and what it
# makes is rounded again. Rows that are compared where the CPU is the measure.
_GRADIENT_STEPS, _DEVICE_ROWS = 4, 600
_SUM_STEP = 2.0**-16  # of a logit that another device adds up in another order

_HEAD_TOKENS = 8  # of a sequence, whose logits are compared
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
    sample = _sample(pairs)
    with evaluating(model), torch.no_grad():
        padded = batch.policy_input(sample, packing=False, pad_id=pad_id).to(device_of(model))
        head, hidden = read_head(model), scored_hidden(model, padded)
        _check_head(model, head, padded, hidden, impl)
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


def _sample(pairs: Sequence[TokenizedPair]) -> list[TokenizedPair]:
    """The shortest pair that has something to get wrong, and median ones, cut short."""
    by_length = sorted(pairs, key=batch.packed_length)
    chosen = [by_length[0]]
    for pair in by_length[len(by_length) // 2 :]:
        chosen.append(pair)
        scored = sum(sum(batch.scored_lengths(pair)) for pair in chosen)
        widest = max(min(batch.packed_length(pair), 2 * _MAX_TOKENS) for pair in chosen)
        if scored >= _ENOUGH_TOKENS or 2 * len(chosen) * widest >= _MOST_PADDED:
            break
    return [
        replace(
            pair,
            prompt_ids=pair.prompt_ids[-_MAX_TOKENS:],
            chosen_ids=pair.chosen_ids[:_MAX_TOKENS],
            rejected_ids=pair.rejected_ids[:_MAX_TOKENS],
        )
        for pair in chosen
    ]


# ---- the head -------------------------------------------------------------------------------


def _check_head(
    model: nn.Module, head: ModelHead, inputs: ModelInput, hidden: Tensor, impl: Impl
) -> None:
    """Our logits against the model's own, of the first tokens of every sequence.

    Of a few alone: logits of whole sequences would be more than a run ever holds.
    """
    firsts = [
        place
        for start, end in pairwise(inputs.cu_seqlens.tolist())
        for place in range(start, min(start + _HEAD_TOKENS, end))
    ]
    theirs = _model_logits(model, inputs, inputs.logit_rows[firsts])
    if theirs.isnan().any():
        way_out = "its weights are damaged, or not those of its config"
        if theirs.dtype == torch.float16:
            way_out = "its numbers leave that range; take bf16=True or, for float32, fp16=False"
        raise UnsupportedModelError(
            f"model: {type(causal_lm(model)).__name__} itself gives NaN for these pairs in "
            f"{theirs.dtype}: {way_out}"
        )
    ours = _our_logits(head, hidden[firsts])
    layer = causal_lm(model).get_output_embeddings()
    of_4_bits = {d for part in layer.modules() if (d := getattr(part, "compute_dtype", None))}
    dtypes = {theirs.dtype, head.weight.dtype, *of_4_bits}
    limit = max(_LOGIT_TOLERANCE, *(_LOGIT_STEPS * torch.finfo(dtype).eps for dtype in dtypes))
    difference = _logit_difference(theirs.float(), ours)
    if not difference <= limit:  # kernels that add in no fixed order: what a second pass gives
        again = _our_logits(head, scored_hidden(model, inputs)[firsts])
        limit = max(limit, 2 * _logit_difference(again, ours))
    if not difference <= limit:
        raise UnsupportedModelError(
            f"model: {type(causal_lm(model)).__name__} turns hidden states into logits in a way "
            f"that is not read here (logits differ by {difference:.2%} of their size, rounding "
            f"explains {limit:.2%}), so it can't be trained"
        )
    _check_kernels(head, hidden[firsts], inputs.target_ids[firsts], impl, float(ours.abs().max()))


def _model_logits(model: nn.Module, inputs: ModelInput, places: Tensor) -> Tensor:  # (n, V)
    """The model's own logits at places of its rows, counted through the rows."""
    width = inputs.input_ids.shape[1]
    kept, at = (places % width).unique(return_inverse=True)
    logits: Tensor = model(
        input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, use_cache=False,
        logits_to_keep=kept,
    ).logits  # fmt: skip
    return logits[places // width, at]


def _our_logits(head: ModelHead, hidden: Tensor) -> Tensor:  # (n, V) float32
    """From the product as the model makes it, so that the same rounding is in both."""
    logits = linear(hidden.to(head.weight.dtype), head.weight, head.bias).float()
    logits = logits * head.logit_scale
    if head.logit_softcap is None:
        return logits
    return head.logit_softcap * torch.tanh(logits / head.logit_softcap)


def _logit_difference(theirs: Tensor, ours: Tensor) -> float:
    """The largest, as a share of the logit and its row's root mean square. NaN: other shapes."""
    if theirs.shape != ours.shape:
        return float("nan")
    size = ours.abs() + ours.square().mean(-1, keepdim=True).sqrt() + _LEAST_LOGIT
    return float(((theirs - ours).abs() / size).max())


def _check_kernels(
    head: ModelHead, hidden: Tensor, target_ids: Tensor, impl: Impl, largest_logit: float
) -> None:
    """The operator and its gradient against plain PyTorch: what is broken on this device.

    Against the CPU's where torch's own products may be wrong, of more rows than a chunk has, since
    the faults known are of later chunks.
    """
    is_trusted = hidden.device.type in ("cpu", "cuda")
    if is_trusted and impl == "torch":
        return
    if not is_trusted:
        times = -(-_DEVICE_ROWS // len(hidden))
        hidden, target_ids = hidden.repeat(times, 1), target_ids.repeat(times)
    other = hidden.device if is_trusted else torch.device("cpu")
    logps, gradient = _with_gradient(head, hidden, target_ids, hidden.device, impl)
    exact, exact_gradient = _with_gradient(head, hidden, target_ids, other, "torch")
    step = torch.finfo(hidden.dtype).eps
    limit = _FULL_TOLERANCE
    if not is_trusted or (hidden.dtype != torch.float32 and not hidden.is_cuda):
        limit += largest_logit * max(step, _SUM_STEP)  # where products may be rounded otherwise
    off = float((logps - exact).abs().max())
    size = float(exact_gradient.abs().max()) + _LEAST_LOGIT
    gradient_off = float((gradient - exact_gradient).abs().max()) / size
    if not (off <= limit and gradient_off <= _FULL_TOLERANCE + _GRADIENT_STEPS * step):
        way_out = "kernel_impl='torch' goes without the kernels" if is_trusted else "use_cpu=True"
        raise RuntimeError(
            f"linear_logps: on this {hidden.device.type} log-probs are {off:.3g} nats and "
            f"gradients {gradient_off:.2%} off plain PyTorch's on the {other.type}; {way_out}"
        )


def _with_gradient(
    head: ModelHead, hidden: Tensor, target_ids: Tensor, device: torch.device, impl: Impl
) -> tuple[Tensor, Tensor]:
    """Log-probs and the gradient of hidden, float32 on the CPU."""
    bias = None if head.bias is None else head.bias.detach().to(device)
    moved = replace(head, weight=head.weight.detach().to(device), bias=bias)
    with torch.enable_grad():
        leaf = hidden.detach().to(device, moved.weight.dtype).requires_grad_()
        logps = moved.token_logps(leaf, target_ids.to(device), impl)
        (gradient,) = torch.autograd.grad(logps.sum(), leaf)
    return logps.detach().float().cpu(), gradient.float().cpu()


# ---- packed against padded ------------------------------------------------------------------


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
    of_4_bits = {d for part in model.modules() if (d := getattr(part, "compute_dtype", None))}
    dtypes = {output.dtype, *of_4_bits, *(p.dtype for p in model.parameters())}
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
