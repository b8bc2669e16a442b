"""Before a run: does our head compute what the model makes of its hidden states, on this device?

Some of the logits the model itself makes are laid beside ours, and the operator beside plain
PyTorch. Rounding is no fault: logits are compared before the softmax, from the same rounded
product, each against its own size, which is what its rounding goes by.
"""

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from rmipo_lite.adapters.base_model import causal_lm
from rmipo_lite.model.backbone import UnsupportedModelError, scored_hidden
from rmipo_lite.model.batch import ModelInput
from rmipo_lite.model.head import ModelHead
from rmipo_lite.ops.devices import is_trusted
from rmipo_lite.ops.native import Impl

# Of a logit and the root mean square of its row. Three roundings lie between the model's and ours
# at most: of the product, of LoRA's sum (or of the scale), of the softcap; together two steps.
_LOGIT_TOLERANCE, _LOGIT_STEPS = 1e-4, 2
_LEAST_LOGIT = 1e-3  # what is smaller changes no probability

# Of the kernels' gradients and the largest of them: a 16-bit derivative is rounded, and what it
# makes is rounded again. Rows that are compared where the CPU is the measure.
_GRADIENT_STEPS, _DEVICE_ROWS = 4, 600
_SUM_STEP = 2.0**-16  # of a logit that another device adds up in another order

_HEAD_TOKENS = 8  # of a sequence, whose logits are compared
_LOGP_TOLERANCE = 1e-3  # nats that sums in another order explain


def check_head(
    model: nn.Module, head: ModelHead, inputs: ModelInput, hidden: Tensor, impl: Impl
) -> None:
    """Our logits against the model's own, of the first tokens of every sequence.

    Of a few alone: logits of whole sequences would be more than a run ever holds.

    Raises:
        UnsupportedModelError: they differ, or the model itself gives NaN.
        RuntimeError: the operator is wrong on this device.
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
    dtypes = {theirs.dtype, head.weight.dtype, *compute_dtypes(layer)}
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


def compute_dtypes(model: nn.Module) -> set[torch.dtype]:
    """What bitsandbytes' layers of a model, or of a part, multiply in."""
    return {dtype for part in model.modules() if (dtype := getattr(part, "compute_dtype", None))}


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
    trusted = is_trusted(hidden.device.type)
    if trusted and impl == "torch":
        return
    if not trusted:
        times = -(-_DEVICE_ROWS // len(hidden))
        hidden, target_ids = hidden.repeat(times, 1), target_ids.repeat(times)
    other = hidden.device if trusted else torch.device("cpu")
    logps, gradient = _with_gradient(head, hidden, target_ids, hidden.device, impl)
    exact, exact_gradient = _with_gradient(head, hidden, target_ids, other, "torch")
    step = torch.finfo(hidden.dtype).eps
    limit = _LOGP_TOLERANCE
    if not trusted or (hidden.dtype != torch.float32 and not hidden.is_cuda):
        limit += largest_logit * max(step, _SUM_STEP)  # where products may be rounded otherwise
    off = float((logps - exact).abs().max())
    size = float(exact_gradient.abs().max()) + _LEAST_LOGIT
    gradient_off = float((gradient - exact_gradient).abs().max()) / size
    if not (off <= limit and gradient_off <= _LOGP_TOLERANCE + _GRADIENT_STEPS * step):
        way_out = "kernel_impl='torch' goes without the kernels" if trusted else "use_cpu=True"
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
