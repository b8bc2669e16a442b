"""A step's gradients: whether they are numbers, and none where the step is to change nothing."""

import torch
from torch import Tensor, nn

from rmipo_lite.ops import device_flag
from rmipo_lite.parallel.sharded import full, is_part


def is_finite(model: nn.Module, loss: Tensor, fp16: bool) -> bool:
    """Whether loss and gradient norm are; the one wait for the device in the whole step.

    Raises:
        ValueError: a GPU met a target outside the vocabulary. (On the CPU the operator itself
            refuses it.)
    """
    device = loss.device
    checks = [torch.isfinite(loss)]
    # With fp16's loss scaling an infinite gradient is the scaler's to see and skip.
    if not fp16:
        checks.append(torch.isfinite(norm_of(model).to(device)))
    if device.type != "cpu":
        checks.append(device_flag(device).eq(0).squeeze())
    results = torch.stack(checks).tolist()
    if device.type != "cpu" and not results[-1]:
        device_flag(device).zero_()
        raise ValueError(
            "a pair of this step has a token id outside the model's vocabulary; the tokenizer "
            "is not the model's"
        )
    return all(results)


def norm_of(model: nn.Module) -> Tensor:
    """The norm of all gradients as one vector; every process must ask where weights are parted."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    kinds = [[g for g in grads if is_part(g)], [g for g in grads if not is_part(g)]]
    norms = [full(nn.utils.get_total_norm(kind)) for kind in kinds if kind] or [torch.zeros(())]
    return norms[0] if len(norms) == 1 else torch.stack([norm.cpu() for norm in norms]).norm()


def clip(model: nn.Module, most: float) -> None:
    """Scale all gradients so that their norm is at most this."""
    norm = norm_of(model)
    for parts in (True, False):
        kind = [p for p in model.parameters() if p.grad is not None and is_part(p) == parts]
        nn.utils.clip_grads_with_norm_(kind, most, norm)


def clear_gradients(model: nn.Module) -> None:
    """As if nothing had been computed."""
    for parameter in model.parameters():
        parameter.grad = None


def void_gradients(model: nn.Module, fp16: bool) -> None:
    """Leave gradients that make the optimizer's step change nothing.

    None does: the optimizer passes such a parameter over. fp16's scaler wants a gradient to look
    at, and skips the step when it is infinite.
    """
    if not fp16:
        clear_gradients(model)
        return
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, torch.inf)
